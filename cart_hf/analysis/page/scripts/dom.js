// Elements, made of attributes and children. Text is always set as text: names come from strangers' files.

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function html(tag, attributes, ...children) {
  return made(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return made(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

// Shortens a text to a width in pixels, as the plots' font measures it.
const ruler = document.createElement("canvas").getContext("2d");
const FONT_SIZE = 12;

function widthOf(text, size = FONT_SIZE) {
  ruler.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
  return ruler.measureText(text).width;
}

function fitted(text, width, size = FONT_SIZE) {
  if (widthOf(text, size) <= width) return text;
  let kept = Math.min(text.length, 60);
  while (kept > 1 && widthOf(`${text.slice(0, kept)}…`, size) > width) kept -= 1;
  return `${text.slice(0, kept).trimEnd()}…`;
}

function widest(texts, size = FONT_SIZE) {
  return texts.reduce((most, text) => Math.max(most, widthOf(text, size)), 0);
}

// A box that is drawn anew when its width changes, so that text keeps its size; `redraw` is for its owner.
function plot(draw) {
  const box = html("div", { class: "plot" });
  let width = 0;
  box.redraw = () => {
    if (width) box.replaceChildren(draw(width));
  };
  new ResizeObserver(([entry]) => {
    const found = Math.floor(entry.contentRect.width);
    if (!found || found === width) return;
    width = found;
    requestAnimationFrame(box.redraw); // within the callback, the new height would be reported as an error
  }).observe(box);
  return box;
}

function nothing(text) {
  return html("p", { class: "nothing" }, text);
}

function panel(title, ...content) {
  return html("figure", { class: "panel" }, title ? html("figcaption", {}, title) : null, ...content);
}

function panels(least, ...content) {
  return html("div", { class: "panels", style: `--least: ${least}px` }, ...content);
}
