// Asks every other second which parts of the page have changed, and exchanges those alone. Without this script the
// page is the same, and is loaded anew by itself.
"use strict";
const note = document.getElementById("live");
const parts = () => [...document.querySelectorAll("[data-part]")];
const marks = (part, what) => [...part.querySelectorAll(what)];
let answered = Date.now();

function exchange(part, told) {
  const open = marks(part, "details").map((one) => one.open);
  const scrolled = marks(part, ".scroll, pre").map((one) => [one.scrollLeft, one.scrollTop]);
  const focus = marks(part, "a, summary, [tabindex]").indexOf(document.activeElement);
  part.innerHTML = told.html;
  part.dataset.digest = told.digest;
  marks(part, "details").forEach((one, n) => { one.open = open[n] ?? one.open; });
  marks(part, ".scroll, pre").forEach((one, n) => { if (scrolled[n]) [one.scrollLeft, one.scrollTop] = scrolled[n]; });
  if (focus >= 0) marks(part, "a, summary, [tabindex]")[focus]?.focus({ preventScroll: true });
}

async function ask() {
  try {
    const known = parts().map((part) => part.dataset.digest).join(",");
    const answer = await fetch(`parts?known=${known}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    const told = await answer.json();
    if (told.order.join() !== parts().map((part) => part.dataset.part).join()) return location.reload();
    document.title = told.title;
    parts().forEach((part) => { if (told.parts[part.dataset.part]) exchange(part, told.parts[part.dataset.part]); });
    answered = Date.now();
    if (note.textContent) note.textContent = "";
  } catch {
    const words = `No answer since ${new Date(answered).toLocaleTimeString()}: the page shows what was known then.`;
    if (note.textContent !== words) note.textContent = words;
  }
  setTimeout(ask, document.hidden ? 15000 : 2000);
}
setTimeout(ask, 2000);
