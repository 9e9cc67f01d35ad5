"""rewards.py and text/latex.py: the answer in a box, exact match, Eq. 1 and Eq. 2."""

import html
import random
import re
import string
import time
import unicodedata
from functools import cache
from itertools import combinations, islice

import pytest
from helpers import records, shared

from masking import mask
from rewards import answer_reward, boxed, exact_match, normalize, recall_reward, trajectory_reward
from rollout import answered
from tasks.evaluate import f1_score, substring_match
from text.latex import unwrap
from text.matching import fold


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{Paris}", "Paris"),
        (r"first \boxed{Paris}, no: \boxed{Rome}", "Rome"),
        (r"\boxed{f{x}{y}}", "f{x}{y}"),
        (r"\boxed{Rome} and \boxed{never closed", "Rome"),
        (r"\boxed{outer \boxed{inner", None),
        (r"\boxed{}", None),
        (r"the final answer in \boxed{}. The clues point to \boxed{Paris}", "Paris"),
        (r"\boxed{Paris}, so I put it in \boxed{ }", "Paris"),
        (r"\boxed{Paris} \boxed{\text{ }} \boxed{\boxed{}}", "Paris"),
        ("Paris", None),
        (r"\boxed Paris", None),
        ("", None),
    ],
)
def test_the_last_closed_box_counts(text, content):
    """Nested braces stay inside, an unclosed or empty box is passed over, and no box is no answer."""
    assert boxed(text) == content


def test_boxes_against_a_brute_force_scan():
    """Over random strings: boxed() equals the last start whose braces balance, found by trying every end."""
    rng = random.Random(0)

    def slow(text):
        for start in reversed([m.end() for m in re.finditer(re.escape("\\boxed{"), text)]):
            for end in range(start, len(text)):
                inside = text[start:end]
                balance = [inside[:n].count("{") - inside[:n].count("}") for n in range(len(inside) + 1)]
                if text[end] == "}" and balance[-1] == 0 and min(balance) >= 0:
                    if "a" in inside:
                        return inside
                    break
        return None

    for _ in range(3000):
        text = "".join(rng.choice(["\\boxed{", "{", "}", "a", " "]) for _ in range(rng.randrange(12)))
        assert boxed(text) == slow(text), text


@pytest.mark.parametrize(
    "prediction, gold, match",
    [
        ("the  Eiffel-Tower!", "Eiffeltower", True),
        ("An Apple", "apple", True),
        ("1.5", "15", False),  # SQuAD's normalisation alone would say True
        ("-5", "5", False),
        ("\u22125", "-5", True),
        ("1,500", "1500", True),
        ("1500.0", "1500", True),
        ("1879.", "1879", True),
        ("1.5 km", "15 km", False),
        ("5th", "5 th", False),
        ("U-235", "U235", True),
        ("", "the", False),
        ("the", "a", False),
        ("", "", False),
        ("...", "...", False),
        (None, "Paris", False),
        ("Paris, France", "Paris", False),
        (r"\text{Paris}", "Paris", True),
        (r"$\mathbf{\textbf{Paris}}$", "Paris", True),
        (r"\mathrm {Ulm}", "Ulm", True),
        ("1{,}500", "1500", True),
        ("1{,}500", "1.500", False),
        ("1939\u20131945", "1939-1945", True),
        ("Gauss\u2014Markov", "Gauss-Markov", True),
        ("O\u2019Brien", "O'Brien", True),
        ("\u201cEmma\u201d", '"Emma"', True),
        ("\ufb01re", "fire", True),
        ("\uff21da", "Ada", True),
        ("e\u0301tude", "\u00e9tude", True),
        ("10\u201315", "1015", False),
        ("102", "10\u00b2", False),
        ("10\u00b2", "10\u00b2", True),
        ("H\u2082O", "H\u2082O", True),
        ("Paris", r"\text{Paris}", False),  # a gold answer is taken as it is
    ],
)
def test_exact_match(prediction, gold, match):
    """Masking's folding and SQuAD's normalisation on both sides, LaTeX off the prediction, numbers as numbers."""
    assert exact_match(prediction, [gold]) is match


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{...}", None),
        (r"\boxed{\,}", None),
        (r"\boxed{?}", None),
        (r"\boxed{\ldots}", None),
        (r"\boxed{\text{ \quad}}", None),
        (r"\boxed{\_\_\_}", None),
        (r"\boxed{$~$}", None),
        ("\\boxed{\u200b}", None),
        (r"\boxed{\text{\u2026}}".replace(r"\u2026", "\u2026"), None),
        (r"\boxed{&nbsp;}", None),
        (r"\boxed{\{\}}", None),
        (r"\boxed{Ulm}, put in \boxed{\dots}", "Ulm"),
        (r"\boxed {Paris}", "Paris"),
        (r"\fbox{Paris}", "Paris"),
        ("\\boxed\n {Paris}", "Paris"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{The}", "The"),
        (r"\boxed{A}", "A"),
        (r"\boxed{C++}", "C++"),
        (r"\boxed{+}", "+"),
        (r"\boxed{0}", "0"),
        (r"\boxed{$\infty$}", r"$\infty$"),
        (r"\boxed{\U0001f40d}".replace(r"\U0001f40d", "\U0001f40d"), "\U0001f40d"),
        (r"\mybox{Paris}", None),
        (r"\boxed{open \}", None),
        (r"\boxed{\sqrt{}}", None),
        (r"\boxed{\rule{1cm}{0.4pt}}", None),
        (r"\boxed{\hskip 1em}", None),
        (r"\boxed{\mkern18mu}", None),
        (r"\boxed{\begin{array}{c}\end{array}}", None),
        (r"\boxed{\fontsize{12}{14}\selectfont}", None),
        (r"\boxed{\tag{1}}", None),
        (r"\boxed{<br>}", None),
        ("\\boxed{\u3164}", None),
        ("\\boxed{\u2800\u115f}", None),
        (r"\boxed{Ulm} \boxed{\boxed{} \text{\fbox{ }}}", "Ulm"),
        (r"\boxed{x \boxed{}}", r"x \boxed{}"),
        (r"\boxed{\boxed{a} b}", "a"),
        (r"\framebox{Ulm}", "Ulm"),
        (r"\\boxed{Ulm}", "Ulm"),
        (r"\boxed{\sqrt{2}}", r"\sqrt{2}"),
        (r"\boxed{<}; \boxed{x<y}", "x<y"),
    ],
)
def test_a_placeholder_is_no_answer(text, content):
    """What normalises to nothing ends nothing; articles, signs and symbols are answers. \\boxed has other spellings."""
    assert boxed(text) == content and answered(text) is (content is not None)


def test_boxes_that_loop_or_nest_cost_little(monkeypatch):
    """A row may repeat \\boxed{ to its end: the characters that are looked at grow as the text does."""
    looked_at = []
    monkeypatch.setattr("rewards.unwrap", lambda text: looked_at.append(len(text)) or unwrap(text))
    for text in ("\\boxed{" * 1000 + "}" * 1000, r"\boxed{ }" * 1000, r"\boxed{\boxed{}" * 500 + "}" * 500):
        looked_at.clear()
        assert boxed(text) is None and boxed(rf"\boxed{{Ulm}} {text}") == "Ulm"
        assert 0 < sum(looked_at) < 2 * len(text)
    start = time.process_time()
    assert boxed("\\boxed{" * 20000) is None and boxed(r"\fbox{Ulm" * 9000 + "}") == "Ulm"
    assert unwrap(r"\text{" * 3000 + "Ulm" + "}" * 3000) == "Ulm"
    assert unwrap(r"\v" + " " * 20000 + "!") == "!"
    assert time.process_time() - start < 3  # a second try at each brace would take minutes


@pytest.mark.parametrize(
    "prediction, gold, match",
    [
        (r"\textbf{New}~\texttt{York}", "New York", True),
        (r"\mbox{New}\quad\underline{York}", "New York", True),
        (r"New\ York\;\!", "New York", True),
        (r"New\!York", "New York", False),
        (r"New\\York", "New York", True),
        (r"{\rm Ulm}", "Ulm", True),
        (r"{\bfseries New} {\it York}", "New York", True),
        (r"\operatorname{{\sc Ulm}}", "Ulm", True),
        (r"\somethingnew*{Ulm}", "Ulm", True),
        (r"\color{red}{Ulm}", "Ulm", True),
        (r"{\color{red} Ulm}", "red Ulm", False),
        (r"\textcolor{blue}{\text{New York}}", "New York", True),
        (r"\href{https://a.b/c_d}{Ulm}", "Ulm", True),
        (r"\(Ulm\)", "Ulm", True),
        (r"\[\left( Ulm \right)\]", "Ulm", True),
        (r"\'Etude", "\u00c9tude", True),
        (r"\'{E}tude", "Etude", False),
        (r'Z{\"u}rich', "Z\u00fcrich", True),
        (r'Z\"urich', "Zurich", False),
        (r"\text{caf{\'e}}", "caf\u00e9", True),
        (r'na\"{\i}ve', "na\u00efve", True),
        (r"Diyarbak\i r", "Diyarbak\u0131r", True),
        (r"Erd\H{o}s", "Erd\u0151s", True),
        (r"Erd\H{o}s", r"Erd\u00f6s".replace(r"\u00f6", "\u00f6"), False),
        (r"\v{S}koda, \v Skoda", "\u0160koda, \u0160koda", True),
        (r"Fran\c cois", "Fran\u00e7ois", True),
        (r"Nguy\~{\^e}n", "Nguy\u1ec5n", True),
        (r"K\=oan \.Zywiec \k{A} \r{u} \d{s}", "K\u014dan \u017bywiec \u0104 \u016f \u1e63", True),
        (r"M\o ller, {\O}re, \AA rhus", "M\u00f8ller, \u00d8re, \u00c5rhus", True),
        (r"Stra\ss e, \L{}\'od\'z", "Stra\u00dfe, \u0141\u00f3d\u017a", True),
        (r"M\o ller", "Moller", False),
        (r"90^\circ", "90\u00b0", True),
        (r"90^{\circ}\text{C}", "90\u00b0C", True),
        (r"90^\circ", "900", False),
        (r"\frac{1}{2}", "1/2", True),
        (r"1\frac{\text{1}}{2}", "1 1/2", True),
        (r"-\dfrac12", "-1/2", True),
        (r"\frac{1}{2}", "12", False),
        (r"1\frac{1}{2}", "11/2", False),
        (r"\sqrt{2}", "2", False),
        (r"10^{12}", "10\u00b9\u00b2", True),
        (r"10^{12}", "1012", False),
        (r"10\textsuperscript{2}", "102", False),
        (r"\mathrm{CO}_{2}", "CO2", True),
        (r"5^{th}", "5th", True),
        (r"about 1\,500", "about 1,500", True),
        (r"about 1\;500", "about 1,500", False),
        (r"50\% of \$5 \& \#1 a\_b", "50% of $5 & #1 a_b", True),
        (r"C\#", "C", False),
        ("AT&amp;T&#39;s", "AT&T's", True),
        ("AT&amp;T", "AT amp T", False),
        (r"$\alpha$-synuclein", "\u03b1-synuclein", True),
        (r"5\times 3", "53", False),
        # Commands without an argument, before one that has one.
        (r"\displaystyle\text{Ulm}", "Ulm", True),
        (r"{\bf\Large\text{Ulm}}", "Ulm", True),
        (r"\mathbf\mathrm{Ulm}", "Ulm", True),
        (r"\therefore\textbf{Ulm}", "Ulm", True),
        (r"\left\{\text{Ulm}\right\}", "Ulm", True),
        (r"\rm{Ulm}", "Ulm", True),
        (r"5\,\mu\text{m}", "5 \u03bcm", True),
        (r"5\,\mu\text{m}", "5", False),
        (r"2\pi\mathrm{r}", "2\u03c0r", True),
        (r"2\pi\mathrm{r}", "2\u03c0 r", False),
        (r"\alpha\text{ Centauri}", "\u03b1 Centauri", True),
        (r"\alpha\ Centauri", "\u03b1 Centauri", True),
        (r"F\sharp\text{ minor}", "F# minor", True),
        (r"\beta{}-carotene", "\u03b2-carotene", True),
        (r"\Omega{m}", "\u03a9m", True),
        (r"\beta{}-carotene", "carotene", False),
        (r"\text{New}\text{ }\text{York}", "New York", True),
        # Spaces with a length; arguments that are no text.
        (r"New\hspace{1cm}York", "New York", True),
        (r"New\hskip1em York", "New York", True),
        (r"New\kern-0.5pt{York}", "New York", True),
        (r"New\hspace{1cm}York", "NewYork", False),
        (r"\begin{array}{c}Ulm\end{array}", "Ulm", True),
        (r"\begin{tabular}[t]{|l|}New\\York\end{tabular}", "New York", True),
        (r"\begin{aligned}{C}\end{aligned}", "C", True),
        (r"\fcolorbox{red}{white}{Ulm}", "Ulm", True),
        (r"\parbox{3cm}{Ulm}", "Ulm", True),
        (r"\raisebox{2pt}{\scalebox{2}{\rotatebox{90}{Ulm}}}", "Ulm", True),
        (r"\fontsize{12}{14}\selectfont Ulm", "Ulm", True),
        (r"Ulm\footnote{a town}~\cite{b}, \ref{c} \tag{1}", "Ulm", True),
        (r"\makebox[2cm]{Ulm}", "Ulm", True),
        (r"\overset{Neu}{Ulm}", "Ulm", False),
        # Fractions, characters, heights.
        (r"\nicefrac{1}{2}", "1/2", True),
        (r"2\sfrac12", "2\u00bd", True),
        (r"\nicefrac{1}{2}", "12", False),
        (r"3 \times 10^8", "3 \u00d7 10\u2078", True),
        (r"3\times10^8", "3\u00d710^8", True),
        (r"\neq", "\u2260", True),
        (r"A \to B", "A \u2192 B", True),
        (r"Ulm\textregistered \copyright{}", "Ulm\u00ae\u00a9", True),
        (r"\textsterling 5", "\u00a35", True),
        (r"\textsterling 5", "5", False),
        (r"C^\#", "C#", True),
        (r"F^\sharp", "F\u266f", True),
        (r"C^{\#}", "C", False),
        (r"SO_4^{2-}", "SO42-", True),
        ("SO\u2084^2-", "SO\u2084\u00b2\u207b", True),
        (r"SO_4^{2-}", "SO42", False),
        # HTML.
        ("<b>Ulm</b>", "Ulm", True),
        ('<span class="x"><EM>Ulm</EM></span>', "Ulm", True),
        ("H<sub>2</sub>O", "H2O", True),
        ("x<sup>2</sup>", "x\u00b2", True),
        ("x<sup>2</sup>", "x2", False),
        ("20<sup>th</sup> century", "20th century", True),
        ("New<br/>York", "New York", True),
        ("a<b and c>d", "ad", False),
        ("&lt;b&gt;", "b", True),
    ],
)
def test_latex_goes(prediction, gold, match):
    """Commands leave their content, accents their letter, spaces a space, escapes their sign; HTML's as well."""
    assert exact_match(prediction, [gold]) is match


@pytest.mark.parametrize(
    "text, plain",
    [
        (r"Schindler\'s List", "Schindler's List"),
        (r"Don\'t, we\'re, I\'m, you\'ll, they\'ve", "Don't, we're, I'm, you'll, they've"),
        (r"O\'Brien and O\'Neill", "O'Brien and O'Neill"),
        (r"Jeanne d\'Arc", "Jeanne d'Arc"),
        (r"\"Emma\"", '"Emma"'),
        (r"\"The Raven\", \"Zo\"e\"", '"The Raven", "Zo\u00eb"'),
        (r"\text{\"Yesterday\"}", '"Yesterday"'),
        (r"rock \'n\' roll", "rock 'n' roll"),
        (r"5\'10\"", "5'10\""),
        (r"\text{Emma}\'s", "Emma's"),
        # Accents stay:
        (r"Gda\'nsk, Przemy\'sl", "Gda\u0144sk, Przemy\u015bl"),
        (r"Zamo\'s\'c", "Zamo\u015b\u0107"),
        (r"\'Etienne, Saint-\'Etienne", "\u00c9tienne, Saint-\u00c9tienne"),
        (r"Garc\'ia, caf\'e", "Garc\u00eda, caf\u00e9"),
        (r"\"Uber M\"unchen", "\u00dcber M\u00fcnchen"),
        (r"\"Osterreich, Bront\"e", "\u00d6sterreich, Bront\u00eb"),
        (r"No\"el", "No\u00ebl"),
        (r"Ru\'{s}", "Ru\u015b"),
    ],
)
def test_escaped_quotes_are_no_accents(text, plain):
    """In pairs around words, before 's and its like, before a capital in a word, and where no letter has the accent."""
    assert unwrap(text) == plain


def test_text_without_its_latex():
    """By hand, the text itself: thin spaces stay thin, an accent makes one letter, a fraction has its stroke."""
    assert unwrap(r"$\text{Z\"urich}$,~1{,}500 \& \frac{1}{2}") == "Z\u00fcrich, 1,500 & 1/2"
    assert unwrap(r"1\,500 {\bf km}\!, \{x\}") == "1\u2009500 km, x"
    assert unwrap("no LaTeX: 5 < 6 & 7, 'x'") == "no LaTeX: 5 < 6 & 7, 'x'"


@pytest.mark.parametrize(
    "prediction, gold, match",
    [
        ("007", "7", False),
        ("Agent 007", "Agent 7", False),
        ("3.10", "3.1", False),
        ("Python 3.10", "Python 3.1", False),
        ("Web 2.0", "Web 2", False),
        ("1,500.0", "1500", True),
        ("$1,500.00", "$1500", True),
        ("about 1,500.0 km", "about 1500 km", True),
        ("2.50", "2.5", False),
        (".406", "0.406", True),
        (".406", "406", False),
        ("an average of .25", "an average of 0.25", True),
        ("an average of .25", "an average of 25", False),
        ("-.5", "-0.5", True),
        ("No.5", "No. 0.5", False),
        ("1\u202f500\u2009000", "1,500,000", True),
        ("about 1\u00a0500 km", "about 1500 km", True),
        ("1 500 000", "1,500,000", True),
        ("1 500.5 km", "1,500.5 km", True),
        ("Apollo 11 100", "Apollo 11100", False),
        ("1 500 and 2 500", "1500 and 2500", False),
        ("1, 500", "1500", False),
        ("15 00", "1500", False),
        ("1 5000", "15000", False),
        ("0 500", "500", False),
        ("1,5", "1.5", False),
        ("1,5000", "15000", False),
        ("1.2.3", "12.3", False),
        ("10.5.1990", "10/5/1990", False),
        ("10-5-1990", "10/5/1990", True),
        ("9/11", "911", False),
        ("\u0661\u0668\u0667\u0669", "1879", True),
        ("1'500", "1500", True),
        ("1\u2019500\u2019000 francs", "1,500,000 francs", True),
        ("1\u066c500", "1500", True),
        ("5'10", "510", False),
        ("1'5000", "15000", False),
        ("1 500 km\u00b2", "1500 km\u00b2", True),
        ("1 500 km2", "1,500 km2", True),
        ("12 500 m^-3", "12500 m^-3", True),
        ("7 000\u20138 000", "7000\u20138000", True),
        ("500-1 000 m", "500-1000 m", True),
        ("1 500 m 2", "1500 m 2", False),
        ("7 000 or 8 000", "7000 or 8000", False),
        ("1914-1 500", "1914-1500", False),
    ],
)
def test_numbers(prediction, gold, match):
    """Grouping, a missing 0 before the point and .0 are spelling; other zeros, points and gaps make another number."""
    assert exact_match(prediction, [gold]) is match and exact_match(gold, [prediction]) is match


@pytest.mark.parametrize(
    "prediction, gold, match",
    [
        ("C", "C++", False),
        ("C#", "C", False),
        ("C#", "C++", False),
        ("the C++.", "C++", True),
        ("A", "A+", False),
        ("A-", "A+", False),
        ("type O-", "Type O\u2212", True),
        ("O", "O-", False),
        ("AB-", "AB", False),
        ("F# minor", "F minor", False),
        ("F\u266f minor", "F# minor", True),
        ("Ca2+", "Ca2", False),
        ("Ca\u00b2\u207a", "Ca2+", True),
        ("Google+!", "Google", False),
        ("100+", "100", True),  # no letter in it: as in SQuAD
        ("New+Zealand", "NewZealand", True),
        ("pre- and postwar", "pre and postwar", True),
        ("Rock'n'roll -", "Rock'n'roll", True),
        ("A", "A", True),
        ("The", "the", True),
        ("The", "A", False),
        ("Hepatitis A", "Hepatitis", False),
        ("Hepatitis", "Hepatitis a.", False),
        ("Serie A", "Serie", False),
        ("the Who", "Who", True),
        ("an Apple a Day", "apple day", True),
        ("Kinks, The", "The Kinks", True),
        ("Clockwork Orange, A", "A Clockwork Orange", True),
        ("Vitamin K, A", "Vitamin A", False),
    ],
)
def test_signs_and_articles_that_carry_the_name(prediction, gold, match):
    """+ and # behind a letter, a minus behind one or two; articles only before a word, or of a name turned round."""
    assert exact_match(prediction, [gold]) is match and exact_match(gold, [prediction]) is match


FOLDED = [
    ("U\u200bl\u00adm\u200e", "Ulm", True),
    ("\ufeffUlm\u2060", "Ulm", True),
    ("e\u200d\u0301tude", "\u00e9tude", True),
    ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645", True),
    ("\u2764\ufe0f", "\u2764", True),
    ("Hawai\u02bbi", "Hawai'i", True),
    ("Qur\u02bcan", "Qur\u00b4an", True),
    ("Gauss\u2015Markov", "Gauss-Markov", True),
    ("Hawai\u02bbi", "Hawai i", False),
    ("\u00bd", "1/2", True),
    ("2\u00bd", "2 1/2", True),
    ("2\u00bd", "21/2", False),
    ("\u2153", "1/2", False),
    ("CO\u2082", "CO2", True),
    ("C\u2086H\u2081\u2082O\u2086", "C6H12O6", True),
    ("10\u00b2", "102", False),
    ("x\u00b2", "x2", False),
    ("10\u00b2", "10^2", True),
    ("5\u1d57\u02b0", "5th", True),
    ("\u0967\u0968", "12", True),
    ("\u0645", "\u0645\u06cc", False),
    ("Na\u207a", "Na+", True),
    ("Ca\u00b2\u207a", "Ca2+", True),
    ("O\u207b", "O-", True),
    ("SO\u2084\u00b2\u207b", "SO42-", True),
    ("\u00b9\u2074C", "14C", True),
    ("\u00b2\u00b3\u2075U", "235U", True),
    ("\u33a1", "m\u00b2", True),
    ("m\u207b\u00b9", "m^-1", True),
    ("10\u00b9\u00b2", "10^12", True),
    ("\u845b\U000e0100\u57ce", "\u845b\u57ce", True),
    ("\u182e\u180b\u1823", "\u182e\u1823", True),
    ("Pa\u034fris\u3164", "Paris", True),
    ("\u33a1", "m2", False),
    ("10\u207b\u00b3", "10-3", False),
    ("U\u00b2\u00b3\u2075", "U235", False),
    ("Na\u207a", "Na", False),
    ("A\u2800B", "AB", False),
]


@pytest.mark.parametrize("one, other, match", FOLDED)
def test_one_fold_for_answers_and_masks(one, other, match):
    """Two spellings are one to the reward exactly where they are one to masking."""
    assert exact_match(one, [other]) is match and exact_match(other, [one]) is match
    assert (fold(one)[0].split() == fold(other)[0].split()) is match
    if match:
        for text, name in ((one, other), (other, one)):
            assert fold(mask(f"so {text} is", name))[0] == "so [mask] is"  # what can't be seen may be left beside it


@pytest.mark.parametrize(
    "prediction, gold, match",
    [
        ("\u6771\u4eac\u3002", "\u6771\u4eac", True),
        ("\u00a1Hola!", "Hola", True),
        ("\u2039Emma\u203a", "Emma", True),
        ("\u300c\u6771\u4eac\u300d", "\u6771\u4eac", True),
        ("\u00bfQui\u00e9n\u2026?", "Qui\u00e9n", True),
        ("\u0645\u0635\u0631\u061f", "\u0645\u0635\u0631", True),
        ("\u6771\u4eac\u3001\u5927\u962a", "\u6771\u4eac", False),
        ("\u092e\u0941\u0902\u092c\u0908\u0964", "\u092e\u0941\u0902\u092c\u0908", True),
        ("\u092e\u0941\u0902\u092c\u0908", "\u092e\u092e\u092c\u0908", False),  # marks of vowels are no punctuation
        ("\u20ac5", "5", False),  # as before: symbols are none either
        ("90\u00b0", "90", False),
        ("5\u00d73", "53", False),
    ],
)
def test_punctuation_of_every_script(prediction, gold, match):
    """Unicode's category P goes as ASCII's punctuation does; marks and symbols stay."""
    assert exact_match(prediction, [gold]) is match and exact_match(gold, [prediction]) is match


@cache
def all_golds():
    """The lists of gold answers of all shared question sets."""
    found = []
    for path in sorted(shared("qa").glob("*.json*")):
        for row in records(f"qa/{path.name}"):
            answers = row.get("golden_answers", row.get("answer"))
            answers = answers if isinstance(answers, list) else [answers]
            found.append([*answers, *row.get("answer_aliases", [])])
    assert len(found) > 6000
    return found


MARKS = "\u0300\u0301\u0302\u0303\u0308\u0304\u0307\u0306\u030c\u030b\u0327\u0328\u030a"
COMBINING = dict(zip(MARKS, "`'^~\"=.uvHckr", strict=True))
LATEX_LETTERS = {"\u00df": "ss", "\u00f8": "o", "\u00d8": "O", "\u00e6": "ae", "\u0142": "l", "\u0131": "i"}


def in_latex(text):
    """A text with its accents and special letters as commands: \u00e9 is \\'{e}."""
    spelt = ""
    for c in unicodedata.normalize("NFC", text):
        base, *marks = unicodedata.normalize("NFD", c)
        if c in LATEX_LETTERS:
            spelt += f"\\{LATEX_LETTERS[c]}{{}}"
        elif len(marks) == 1 and marks[0] in COMBINING:
            spelt += f"\\{COMBINING[marks[0]]}{{{base}}}"
        else:
            spelt += c
    return spelt


CHANGES = {
    "itself": lambda gold: gold,
    "text": lambda gold: rf"\text{{{gold}}}",
    "bold maths": lambda gold: rf"$\mathbf{{\mbox{{{gold}}}}}$",
    "switch": lambda gold: rf"\({{\rm {gold}}}\)",
    "colour": lambda gold: rf"\textcolor{{red}}{{{gold}}}",
    "accents": in_latex,
    "decomposed": lambda gold: unicodedata.normalize("NFD", gold),
    "escapes": lambda gold: re.sub(r"([%$&#_])", r"\\\1", gold),
    "html": html.escape,
    "ties": lambda gold: gold.replace(" ", "~"),
    "spaces": lambda gold: gold.replace(" ", r"\;"),
    "no-break": lambda gold: gold.replace(" ", "\u00a0"),
    "zero width": lambda gold: "\u200b".join(gold),
    "soft hyphens": lambda gold: "\u00ad" + "\u00ad".join(gold),
    "direction": lambda gold: f"\u200e{gold}\u200f",
    "full stop": lambda gold: f"{gold}.",
    "closing": lambda gold: f"\u00bf{gold}\u3002",
    "quoted": lambda gold: f"\u201c{gold}\u201d",
    "angled": lambda gold: f"\u2039{gold}\u203a",
    "apostrophes": lambda gold: gold.replace("'", "\u02bc"),
    "dashes": lambda gold: gold.replace("-", "\u2013"),
}


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_a_gold_answer_matches_however_it_is_written(every):
    """Every real gold, but three that are nothing but punctuation; and in a box it is an answer.

    Without -m slow all that aren't ASCII or have a sign beside a letter, and every 20th of the others.
    """
    golds = sorted({gold for golds in all_golds() for gold in golds})
    assert [gold for gold in golds if not normalize(gold)] == [")", "*", "---"]
    golds = [gold for gold in golds if normalize(gold)]
    telling = [gold for gold in golds if not gold.isascii() or re.search(r"\w[+#]|\b\w\w?-(?!\w)", gold)]
    assert len(telling) > 1000
    wrong = []
    for gold in {*telling, *golds[::every]}:
        for name, change in CHANGES.items():
            said = change(gold)
            if not exact_match(said, [gold]) or boxed(rf"so \boxed{{{said}}}") != said:
                wrong.append((name, said, gold))
    assert not wrong, (len(wrong), wrong[:20])


def test_any_of_several_answers():
    """One of the gold answers is enough, and none of none is."""
    assert exact_match("NYC", ["New York", "NYC"]) and not exact_match("NYC", [])


@cache
def squad_words(text, guarded=True):
    """The words that the SQuAD v1.1 script compares, step by step: small letters, no punctuation, no articles.

    Before that, NFKC without invisible characters. `guarded`: its numbers are spelt, and an article at the end stays.
    """
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").replace("\u00b4", "'")
    text = "".join(f"^{c}" if c in "\u00b2\u00b3" else f" {c}" if c in "\u00bd\u00bc" else c for c in text)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.replace("\u2212", "-").replace("\u2044", "/")
    for inverted in (", the", ", a", ", an"):
        text = text.removesuffix(inverted)
    if guarded:
        text = spelt_numbers(text)
        text = re.sub(r"(?<=[a-z])[+](?= |$)", "plus", text).replace("c#", "csharp")
    text = "".join(c for c in text if not mark(c))
    words = text.split()
    articles = [word in ("a", "an", "the") and not (guarded and n == len(words) - 1) for n, word in enumerate(words)]
    return tuple(word for word, article in zip(words, articles, strict=True) if not article)


def mark(c):
    return c in string.punctuation or unicodedata.category(c)[0] == "P" or c in "\u02bb\u02bc\u02be\u02bf\u02b9"


def spelt_numbers(text):
    """Numbers so written that no punctuation is in them, character by character: "-1,500.5" is "minus1500point5"."""
    spelt, n = "", 0
    while n < len(text):
        starts = text[n] == "." and text[n + 1 : n + 2].isdigit()
        starts = starts and not (n and (text[n - 1].isalnum() or text[n - 1] in ".,"))
        if not text[n].isdigit() and not starts:
            spelt += text[n]
            n += 1
            continue
        start = n
        while n < len(text) and (text[n].isdigit() or text[n] in ".," and text[n + 1 : n + 2].isdigit()):
            n += 1
        whole, _, decimals = text[start:n].partition(".")
        first, *groups = whole.split(",")
        if "." in decimals or "," in decimals or groups and len(first) > 3 or any(len(group) != 3 for group in groups):
            number = text[start:n].replace(".", "point").replace(",", "gap")
        else:
            begins = not any(c.isalnum() for c in text[:start])
            if not decimals.strip("0") and (groups or begins):
                decimals = ""
            number = (first or "0") + "".join(groups) + ("point" + decimals if decimals else "")
        minus = text[start - 1 : start] == "-" and not text[start - 2 : start - 1].isalnum()
        spelt += "minus" * minus + number
        end = n
        while end < len(text) and mark(text[end]):
            end += 1
        if end > n and text[end : end + 1].isdigit():  # punctuation between two numbers keeps them apart
            spelt += "gap"
            n = end
    return spelt


def squad_exact(prediction, golds):
    return any(squad_words(prediction) == squad_words(gold) != () for gold in golds)


def squad_f1(prediction, golds):
    scores = []
    for gold in golds:
        left, right, shared = squad_words(prediction), list(squad_words(gold)), 0
        for word in left:
            if word in right:
                right.remove(word)
                shared += 1
        precision, recall = shared / max(len(left), 1), shared / max(len(squad_words(gold)), 1)
        scores.append(2 * precision * recall / (precision + recall) if shared else 0.0)
    return max(scores)


@cache
def answer_pairs():
    """(prediction, golds) of the shared question sets: pairs of answers to one question, and answers to others."""
    fields = {"nq_open_dev_3610": "answer", "bamboogle_125": "golden_answers", "popqa_1000": "golden_answers",
              "triviaqa_1000": "golden_answers", "hotpotqa_dev_distractor_200": "answer"}
    rng, pairs = random.Random(0), []
    for name, field in fields.items():
        rows = [row[field] for row in records(f"qa/{name}.jsonl")]
        rows = [row if isinstance(row, list) else [row] for row in rows]
        for row in rows:
            pairs += [(a, [a]) for a in row]
            pairs += [pair for a, b in islice(combinations(row, 2), 40) for pair in ((a, [b]), (b, [a]))]
            pairs += [(rng.choice(rng.choice(rows)), row) for _ in range(2)]
    return pairs


def test_exact_match_and_f1_against_a_written_out_squad_scorer():
    """On all pairs of real answers F1 and exact match are those of SQuAD's words with the numbers spelt.

    And those of SQuAD's words as they are, but for one pair in a thousand. What has no words is never right.
    """
    guarded = matched = partial = 0
    for prediction, golds in answer_pairs():
        f1, same = f1_score(prediction, golds), exact_match(prediction, golds)
        assert abs(f1 - squad_f1(prediction, golds)) < 1e-12, (prediction, golds)
        assert same == squad_exact(prediction, golds), (prediction, golds)
        partial += 0 < f1 < 1
        matched += same
        plain = [squad_words(text, guarded=False) for text in (prediction, *golds)]
        guarded += same != (plain[0] in plain[1:])
    assert matched > 5000 and partial > 5000 and 0 < guarded < 0.001 * matched, (matched, partial, guarded)


@pytest.mark.parametrize(
    "prediction, golds, f1, inside",
    [
        ("Paris", ["Paris"], 1.0, True),
        ("the city of Paris", ["Paris"], 0.5, True),
        ("Paris", ["the city of Paris"], 0.5, False),  # MemAgent's scripts count this direction too
        ("Parisian", ["Paris"], 0.0, False),
        ("New, York!", ["new york city", "York"], 0.8, True),
        ("York New", ["New York"], 1.0, False),
        ("yes yes yes", ["yes"], 0.5, True),
        ("no", ["yes", "NO."], 1.0, True),
        ("", ["the"], 0.0, False),
        ("", [""], 0.0, False),
        ("anything", ["the", "!"], 0.0, False),
        ("the", ["the"], 1.0, True),
        ("Paris", [], 0.0, False),
        (None, ["Paris"], 0.0, False),
    ],
)
def test_f1_and_substring(prediction, golds, f1, inside):
    """The best of several golds; the gold's whole words inside the prediction only; nothing is never right."""
    assert abs(f1_score(prediction, golds) - f1) < 1e-12 and substring_match(prediction, golds) is inside


def test_substring_against_a_scan_of_the_words():
    """On every fourth pair of real answers: some gold's words stand at some place of the prediction's words."""
    found = 0
    for prediction, golds in answer_pairs()[::4]:
        words, lists = squad_words(prediction), [squad_words(gold) for gold in golds]
        slow = any(gold and words[n : n + len(gold)] == gold for gold in lists for n in range(len(words)))
        assert substring_match(prediction, golds) is slow, (prediction, golds)
        found += slow and not squad_exact(prediction, golds)
    assert found > 500


@pytest.mark.parametrize(
    "prediction, score",
    [
        ("Ulm; 1879", 1.0),
        ("the Ulm;1879;", 1.0),
        ("Ulm", 0.5),
        ("Ulm;", 0.5),
        ("; 1879", 0.5),
        ("1879; Ulm", 0.0),
        ("Ulm; 1879; Bern", 0.5),
        ("Ulm 1879", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_two_objectives(prediction, score):
    """Answers count in their order; a missing one is wrong, a guess too many spoils the last."""
    assert answer_reward(prediction, [["Ulm", "Ulm, Germany"], ["1879"]]) == score


@pytest.mark.parametrize(
    "prediction, score",
    [
        (r"\text{Ulm; AT&T}", 1.0),
        (r"\text{Ulm}; \text{AT\&T}", 1.0),
        ("Ulm; AT&amp;T", 1.0),
        (r"Ulm\;; AT\&amp;T", 1.0),
        (r"$\mathrm{Ulm;\ AT\&T}$", 1.0),
        (r"{\bf U&#108;m;}\quad\texttt{AT\&T}", 1.0),
        (r"\boxed{Ulm};\fbox{AT&T}", 1.0),
        (r"\text{AT&amp;T; Ulm}", 0.0),
        (r"Ulm\;AT\&T", 0.0),
        (r"\text{Ulm; AT&amp;T; Bern}", 0.5),
        (r"Ulm &amp; AT&amp;T", 0.0),
        (r"\text{;} AT&amp;T", 0.5),
        ("Ulm\uff1bAT&T", 1.0),
        ("Ulm\u061b AT&T", 1.0),
        ("Ulm\u037e AT&T", 1.0),
        ("Ulm\uff0cAT&T", 0.0),
    ],
)
def test_objectives_in_latex_and_html(prediction, score):
    """What LaTeX and HTML write with a semicolon parts nothing; what stands in a wrapper is parted."""
    assert answer_reward(prediction, [["Ulm"], ["AT&T"]]) == score


def test_one_objective_is_exact_match():
    """One question's answer is not split, and of four right answers each is worth a quarter."""
    assert answer_reward("Rock; Paper", [["rock paper"]]) == 1.0
    assert answer_reward("Rock\uff1bPaper\uff1b Scissors", [["Rock"], ["paper scissors"]]) == 1.0
    assert answer_reward("Rock", [["Rock"], *[["x"]] * 3]) == 0.25


def test_the_reward_of_an_answer():
    """Exact match of one question, 0 or 1; of several their mean; nothing for no answer."""
    assert answer_reward("ulm", ["Bern", "Ulm"]) == 1.0 and answer_reward("Ulm am See", ["Ulm"]) == 0.0
    assert answer_reward("Ulm; Bern", [["Ulm"], ["Basel"]]) == 0.5
    assert answer_reward(None, ["Ulm"]) == 0.0 and answer_reward(None, [["Ulm"], ["Basel"]]) == 0.0


def test_rewards_of_eq_1_and_eq_2():
    """Eq. 1 is 0 or 1 by the box alone; Eq. 2 adds lambda times the mean, and nothing without recall."""
    assert recall_reward(r"so \boxed{Ulm}", "Ulm") == 1.0 and recall_reward("Ulm", "Ulm") == 0.0
    assert trajectory_reward(True, [1.0, 0.0, 0.0, 0.0], 0.5) == 1.125
    assert trajectory_reward(False, [1.0, 1.0], 0.5) == 0.5
    assert trajectory_reward(True, [], 0.5) == 1.0
