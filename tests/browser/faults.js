// What is wrong with a page for people who see badly, use the keyboard, or have a narrow screen. Returns sentences.
() => {
  const found = [];
  const all = (what, within = document) => [...within.querySelectorAll(what)];
  const short = (one) => `<${one.tagName.toLowerCase()}> ${(one.textContent || "").trim().slice(0, 50)}`;
  const shown = (one) => one.checkVisibility({ contentVisibilityAuto: true }) && one.getClientRects().length > 0;

  if (document.documentElement.scrollWidth > window.innerWidth)
    found.push(`the page scrolls sideways: ${document.documentElement.scrollWidth} of ${window.innerWidth} pixels`);
  if (!document.documentElement.lang) found.push("the page has no language");
  if (!document.title.trim()) found.push("the page has no title");
  if (all("main").length !== 1) found.push("not one <main>");

  const levels = all("h1, h2, h3, h4").map((one) => [Number(one.tagName[1]), one]);
  if (levels.filter(([level]) => level === 1).length !== 1) found.push("not one <h1>");
  levels.reduce((before, [level, one]) => {
    if (level > before + 1) found.push(`after level ${before} comes ${short(one)}`);
    if (!one.textContent.trim()) found.push(`an empty heading ${one.outerHTML}`);
    return level;
  }, 0);

  const ids = all("[id]").map((one) => one.id);
  ids.filter((id, n) => ids.indexOf(id) !== n).forEach((id) => found.push(`twice the id ${id}`));
  all("a[href^='#']").forEach((one) => {
    if (!document.getElementById(one.getAttribute("href").slice(1))) found.push(`leads nowhere: ${short(one)}`);
  });
  all("a, summary").filter((one) => !one.textContent.trim()).forEach((one) => found.push(`no words: ${one.outerHTML}`));
  all("progress, meter").forEach((one) => {
    if (one.getAttribute("aria-hidden") !== "true" && !one.labels.length) found.push(`no label: ${one.outerHTML}`);
  });
  all("svg").forEach((one) => {
    if (one.getAttribute("role") !== "img" || !one.getAttribute("aria-label")) found.push("a drawing without words");
  });
  all("[aria-labelledby]").forEach((one) => {
    if (!document.getElementById(one.getAttribute("aria-labelledby"))) found.push(`labelled by nothing: ${short(one)}`);
  });

  all("table").forEach((table) => {
    const heads = all("th", table);
    if (!heads.length && table.rows.length > 1) found.push(`a table without heads: ${short(table)}`);
    heads.filter((one) => !one.scope).forEach((one) => found.push(`a head without scope: ${short(one)}`));
    const region = table.closest("[role=region]");
    if (!region || !region.getAttribute("aria-label")) found.push(`a table without a name: ${short(table)}`);
    const widths = [...table.rows].map((row) => [...row.cells].reduce((sum, cell) => sum + cell.colSpan, 0));
    if (new Set(widths).size > 1) found.push(`lines of other lengths: ${short(table)}`);
  });
  all("*").filter((one) => shown(one) && one.scrollWidth > one.clientWidth + 1 && one !== document.documentElement)
    .filter((one) => ["auto", "scroll"].includes(getComputedStyle(one).overflowX))
    .filter((one) => one.tabIndex < 0 && !one.querySelector("a, summary, button"))
    .forEach((one) => found.push(`scrolls, but not with the keyboard: ${short(one)}`));

  // contrast of all text: 4.5, large text 3 (WCAG 2.2, 1.4.3)
  const brush = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgba = (colour) => {
    if (!known.has(colour)) {
      brush.clearRect(0, 0, 1, 1);
      brush.fillStyle = colour;
      brush.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const behind = (one) => {
    const layers = [];
    for (let up = one; up; up = up.parentElement) layers.push(rgba(getComputedStyle(up).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const bright = (colour) => {
    const [r, g, b] = colour.map((part) => part / 255).map((s) => (s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const pale = new Set();
  while (walk.nextNode()) {
    const one = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !shown(one) || one.closest("script, style, .skip")) continue;
    const style = getComputedStyle(one);
    const drawn = one.closest("svg");
    const back = behind(drawn ? drawn.parentElement : one);
    const front = over(rgba(drawn ? style.fill : style.color), back);
    const [light, dark] = [bright(front), bright(back)].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < least) pale.add(`contrast ${contrast.toFixed(2)}, ${least} needed: ${short(one)}`);
  }
  return [...found, ...[...pale].slice(0, 10)];
}
