// Fills the page.

for (const place of document.querySelectorAll("[data-section]")) sections[place.dataset.section](place);

// Where the reader is, in the list of contents.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    for (const [id, link] of links) {
      if (id === target.id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }
}, { rootMargin: "-15% 0px -75% 0px" });
document.querySelectorAll("main section[id]").forEach((section) => watcher.observe(section));
