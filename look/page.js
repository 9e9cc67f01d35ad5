// Shows one panel of many: a document, one of its trajectories, one of its turns.
const panels = [...document.querySelectorAll(".panel")];
const sample = document.getElementById("sample"), trajectory = document.getElementById("trajectory");
const place = document.getElementById("place");
let turn = 0;
function show() {
  const chosen = panels.filter(p => p.dataset.sample === sample.value && p.dataset.trajectory === trajectory.value);
  turn = Math.max(0, Math.min(turn, chosen.length - 1));
  panels.forEach(p => p.classList.remove("on"));
  if (!chosen.length) return;
  chosen[turn].classList.add("on");
  place.textContent = `${turn + 1} of ${chosen.length}`;
}
function offer(select, of, name) {
  const choices = new Map(of.map(p => [p.dataset[select.id], p.dataset[name]]));
  select.replaceChildren(...[...choices].map(([value, text]) => new Option(text, value)));
}
function fill() {
  offer(trajectory, panels.filter(p => p.dataset.sample === sample.value), "name");
  turn = 0;
  show();
}
if (panels.length) {
  document.documentElement.classList.add("js");
  sample.onchange = fill;
  trajectory.onchange = show;
  document.getElementById("back").onclick = () => { turn -= 1; show(); };
  document.getElementById("next").onclick = () => { turn += 1; show(); };
  document.onkeydown = event => {
    if (["SELECT", "INPUT"].includes(event.target.tagName)) return;
    if (event.key === "ArrowLeft") { turn -= 1; show(); }
    if (event.key === "ArrowRight") { turn += 1; show(); }
  };
  offer(sample, panels, "step");
  sample.selectedIndex = sample.length - 1;
  fill();
}
// A test in a browser waits for it.
document.body.dataset.ready = panels.length;
