"use strict";

// What an element of a drawing says. Its <title> is the only place where that stands; it is taken
// out at the first touch, so that the browser does not show it a second time.
const told = new Map();
function telling(element) {
  if (!told.has(element)) {
    const title = element.querySelector(":scope > title");
    told.set(element, title.textContent);
    element.setAttribute("aria-label", title.textContent);
    title.remove();
  }
  return told.get(element);
}

const tip = document.getElementById("tip");
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 10) : y + 18}px`;
}

class Drawing {
  constructor(figure) {
    this.section = figure.closest("section");
    this.canvas = figure.querySelector(".canvas");
    this.svg = this.canvas.querySelector("svg");
    this.details = figure.querySelector(".details");
    this.count = figure.querySelector(".count");
    this.search = figure.querySelector("input");
    const { width, height } = this.svg.viewBox.baseVal;
    this.width = width;
    this.height = height;
    this.items = [...this.svg.querySelectorAll(figure.dataset.items)];
    this.matches = this.items;
    this.at = -1;
    this.halo = document.createElementNS(this.svg.namespaceURI, "rect");
    this.halo.classList.add("halo");
    figure.querySelector(".tools").hidden = false;
    figure.querySelector(".tools").addEventListener("click", (e) => this.act(e.target.dataset.do));
    this.search.addEventListener("input", () => this.find());
    this.search.addEventListener("keydown", (e) => {
      if (e.key === "Enter") this.step(e.shiftKey ? -1 : 1);
    });
    this.canvas.addEventListener("keydown", (e) => this.press(e));
    this.canvas.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
    this.canvas.addEventListener("pointermove", (e) => this.hover(e));
    this.canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
    this.canvas.addEventListener("scroll", () => { tip.hidden = true; });
    this.canvas.addEventListener("pointerdown", (e) => this.drag(e));
    this.canvas.addEventListener("click", (e) => {
      if (!this.moved && this.told(e.target)) this.select(this.told(e.target));
    });
    this.fit();
  }

  // The nearest element around a target that says something, the whole drawing apart.
  told(target) {
    let element = target;
    while (element !== this.svg && element !== this.canvas) {
      if (told.has(element) || element.querySelector(":scope > title")) return element;
      element = element.parentNode;
    }
    return null;
  }

  act(what) {
    const middle = [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2];
    if (what === "in") this.zoom(this.scale * 1.4, ...middle);
    if (what === "out") this.zoom(this.scale / 1.4, ...middle);
    if (what === "fit") this.fit();
    if (what === "whole") this.zoom(1, ...middle);
    if (what === "next") this.step(1);
    if (what === "previous") this.step(-1);
  }

  press(e) {
    const what = { "+": "in", "=": "in", "-": "out", 0: "fit", 1: "whole", Enter: "next" }[e.key];
    if (!what || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    this.act(what === "next" && e.shiftKey ? "previous" : what);
  }

  // A wheel alone scrolls, as it does everywhere.
  wheel(e) {
    if (!e.ctrlKey && !e.metaKey) return;
    e.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    this.zoom(this.scale * Math.exp(-e.deltaY / 400), e.clientX - box.left, e.clientY - box.top);
  }

  // Set the scale; what is at (x, y) in the canvas stays there.
  zoom(scale, x, y) {
    const wanted = Math.min(8, Math.max(0.02, scale));
    const left = (this.canvas.scrollLeft + x) / this.scale;
    const top = (this.canvas.scrollTop + y) / this.scale;
    this.scale = wanted;
    this.svg.style.width = `${this.width * wanted}px`;
    this.svg.style.height = `${this.height * wanted}px`;
    this.canvas.scrollLeft = left * wanted - x;
    this.canvas.scrollTop = top * wanted - y;
    tip.hidden = true;
  }

  // The section is as wide as the canvas, and known before the browser has laid out what is in it.
  fit() {
    const room = Math.min(
      (this.section.clientWidth - 2) / this.width,
      (innerHeight * 0.82 - 2) / this.height,
    );
    this.scale = 1;
    this.zoom(Math.min(1.4, room), 0, 0);
  }

  drag(e) {
    this.moved = false;
    if (e.button !== 0 || e.pointerType === "touch") return;
    const { canvas } = this;
    const start = [canvas.scrollLeft + e.clientX, canvas.scrollTop + e.clientY];
    const move = (m) => {
      const [x, y] = [start[0] - m.clientX, start[1] - m.clientY];
      this.moved ||= Math.abs(x - canvas.scrollLeft) + Math.abs(y - canvas.scrollTop) > 4;
      if (!this.moved) return;
      canvas.classList.add("dragged");
      canvas.scrollTo(x, y);
    };
    const end = () => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
      removeEventListener("pointercancel", end);
      canvas.classList.remove("dragged");
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
    addEventListener("pointercancel", end);
  }

  hover(e) {
    const element = e.buttons ? null : this.told(e.target);
    if (element) showTip(telling(element), e.clientX, e.clientY);
    else tip.hidden = true;
  }

  find() {
    const wanted = this.search.value.trim().toLowerCase();
    const says = (e) => told.get(e) ?? e.querySelector(":scope > title").textContent;
    this.matches = this.items.filter((e) => says(e).toLowerCase().includes(wanted));
    this.at = -1;
    this.step(1);
  }

  step(by) {
    const n = this.matches.length;
    this.at = n && (this.at + by + n) % n;
    this.count.textContent = n ? `${this.at + 1} of ${n}` : "no match";
    if (n) this.select(this.matches[this.at]);
  }

  // Outline an element, bring it to the middle and tell what it is.
  select(element) {
    this.details.textContent = telling(element);
    this.details.hidden = false;
    const box = element.getBBox();
    for (const name of ["x", "y", "width", "height"]) this.halo.setAttribute(name, box[name]);
    element.parentNode.append(this.halo);
    if (this.scale < 0.6) this.zoom(0.8, 0, 0);
    const inside = element.getBoundingClientRect();
    const outside = this.canvas.getBoundingClientRect();
    this.canvas.scrollBy(
      inside.left + inside.width / 2 - outside.left - outside.width / 2,
      inside.top + inside.height / 2 - outside.top - outside.height / 2,
    );
  }
}

const drawings = [...document.querySelectorAll(".drawing")].map((figure) => new Drawing(figure));

// A link to a node of the graph.
function follow() {
  const element = location.hash && document.getElementById(location.hash.slice(1));
  const drawing = element && drawings.find((d) => d.items.includes(element));
  if (!drawing) return;
  drawing.canvas.scrollIntoView({ block: "nearest" });
  drawing.select(element);
}
addEventListener("hashchange", follow);
addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (link && link.hash === location.hash) follow(); // nothing changes, so no event tells of it
});
follow();

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending"
        || (!head.hasAttribute("aria-sort") && !head.classList.contains("number"));
      const key = (row) => row.cells[column];
      const order = (a, b) => (head.classList.contains("number")
        ? Number(key(a).dataset.value ?? -Infinity) - Number(key(b).dataset.value ?? -Infinity)
        : key(a).textContent.localeCompare(key(b).textContent, undefined, { numeric: true }));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a))));
    });
  });
}
