// One tooltip for all plots: by mouse, by finger, and by the arrow keys of a plot that has the focus.

const tip = html("div", { class: "tip", hidden: true });
const spoken = html("div", { class: "unseen", "aria-live": "polite" });
document.body.append(tip, spoken);
let current = null; // the plot that it belongs to: { hide, follow }

function tipRow({ name, value, colour, dash, strong }) {
  const swatch = colour ? html("td", {}, swatchOf(colour, dash)) : null;
  return html("tr", { class: strong ? "strong" : null }, swatch, html("th", { scope: "row" }, name), html("td", {}, value));
}

function showTip(found, x, y) {
  tip.replaceChildren(
    found.title ? html("strong", {}, found.title) : "",
    html("table", {}, html("tbody", {}, found.rows.map(tipRow))),
    found.note ? html("p", {}, found.note) : "",
  );
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const [wide, high] = [document.documentElement.clientWidth, window.innerHeight];
  const left = x + 16 + width > wide - 4 ? x - 16 - width : x + 16;
  tip.style.left = `${Math.max(4, Math.min(left, wide - width - 4))}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 16, high - height - 4))}px`;
}

/* Gives a plot its tooltip.
   about.at(x, y): the stop that a place of the drawing belongs to, or null.
   about.step(stop or null, key): the stop that an arrow key leads to.
   about.describe(stop): { title, rows, note, x, y }: what is said, and where the stop lies.
   about.mark(stop or null): shows in the drawing where the reader is. */
function interactive(root, about) {
  let [stop, byKey] = [null, false];
  const hide = () => {
    stop = null;
    about.mark(null);
    if (current === own) tip.hidden = true; // it may have gone to another plot since
  };
  const place = (x, y) => {
    const box = root.getBoundingClientRect();
    const unit = box.width / root.viewBox.baseVal.width;
    return [box.left + x * unit, box.top + y * unit, unit, box];
  };
  const own = {
    hide,
    follow: () => {
      if (!byKey || stop === null) return hide();
      const found = about.describe(stop);
      return showTip(found, ...place(found.x, found.y).slice(0, 2));
    },
  };
  const show = (next, x, y) => {
    if (current !== own) current?.hide();
    current = own;
    stop = next;
    about.mark(stop);
    showTip(about.describe(stop), x, y);
  };
  const point = (event) => {
    const [, , unit, box] = place(0, 0);
    const next = about.at((event.clientX - box.left) / unit, (event.clientY - box.top) / unit);
    byKey = false;
    if (next === null) hide();
    else show(next, event.clientX, event.clientY);
  };
  const step = (key) => {
    const next = about.step(stop, key);
    if (next === null || next === undefined) return;
    const found = about.describe(next);
    byKey = true;
    show(next, ...place(found.x, found.y).slice(0, 2));
    const words = found.rows.map((row) => `${row.name}: ${row.value}`).join("; ");
    spoken.textContent = `${found.title || ""}. ${words}${found.note ? `. ${found.note}` : ""}`;
  };
  root.setAttribute("tabindex", "0");
  root.setAttribute("aria-label", `${root.getAttribute("aria-label")}; arrow keys read the values`);
  root.addEventListener("pointermove", point);
  root.addEventListener("pointerdown", point);
  root.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && hide());
  root.addEventListener("blur", hide);
  root.addEventListener("focus", () => root.matches(":focus-visible") && step("Home"));
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    step(event.key);
  });
  return root;
}

document.addEventListener("pointerdown", (event) => event.target.closest(".plot svg") || current?.hide());
window.addEventListener("scroll", () => tip.hidden || current.follow(), { passive: true });

// The place in a list that an arrow key leads to.
function stepped(place, count, key) {
  if (!count) return null;
  if (place === null || place === undefined || key === "Home") return 0;
  if (key === "End") return count - 1;
  return Math.min(count - 1, Math.max(0, place + (key === "ArrowRight" || key === "ArrowDown" ? 1 : -1)));
}
