// Stores grades in the browser and saves them as a file. The page does not contain the names of models.
const form = document.getElementById("form"), rater = document.getElementById("rater");
const sheet = form.dataset.sheet, place = "rating-" + sheet;
const grades = () => Object.fromEntries([...form.querySelectorAll("input[type=radio]:checked")].map(x => [x.name, Number(x.value)]));
function count() {
  const done = Object.keys(grades()).length, all = Number(form.dataset.answers);
  document.getElementById("done").textContent = done + " of " + all + " answers graded";
}
function keep() {
  try { localStorage.setItem(place, JSON.stringify({rater: rater.value, ratings: grades()})); } catch (e) { /* private window: no storage */ }
  count();
}
try {
  const kept = JSON.parse(localStorage.getItem(place) || "{}");
  rater.value = kept.rater || "";
  for (const [name, value] of Object.entries(kept.ratings || {})) {
    for (const x of form.querySelectorAll("input[type=radio]")) if (x.name === name && x.value === String(value)) x.checked = true;
  }
} catch (e) { /* no stored grades */ }
form.addEventListener("change", keep);
rater.addEventListener("input", keep);
document.getElementById("save").addEventListener("click", () => {
  const name = rater.value.trim();
  if (!name) { rater.focus(); document.getElementById("done").textContent = "Enter a name first. It must be unique among the raters."; return; }
  const content = JSON.stringify({sheet: sheet, rater: name, ratings: grades()}, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], {type: "application/json"}));
  link.download = "ratings-" + name.replace(/[^A-Za-z0-9_-]+/g, "_") + ".json";
  link.click();
});
count();
