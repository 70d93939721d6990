"use strict";
// Charts are drawn when they come into view. The specification of each stands beside it as JSON.
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = new Map();

// Colours of lines and points: at least 3:1 against the paper of either theme.
const colours = ["#2a8fd0", "#d9700f", "#1f9a63", "#d0488f", "#8d74e0", "#b08a00", "#6f8796", "#dd5050", "#159aa6",
  "#a9764f"];

function options(box, inDark) {
  return {
    actions: false,
    config: {
      background: inDark ? getComputedStyle(document.body).backgroundColor : "#ffffff",
      text: { color: inDark ? "#dddddd" : "#222222" },
      range: { category: colours },
    },
    renderer: box.dataset.renderer,
    theme: inDark ? "dark" : undefined,
  };
}

function specification(box) {
  const spec = JSON.parse(document.getElementById(box.dataset.spec).textContent);
  if (spec.concat && box.clientWidth < 700) spec.columns = 1;
  return spec;
}

function draw(box) {
  const menus = box.closest("figure").querySelector(".menus");
  menus.replaceChildren();
  vegaEmbed(box, specification(box), { ...options(box, dark.matches), bind: menus }).then(
    ({ view }) => {
      views.set(box, view);
      // A finger does not hover: a tap shows what pointing shows.
      const say = (event, item) => view.tooltip()(null, event.changedTouches?.[0] ?? event, item, item?.tooltip);
      for (const kind of ["click", "touchend"]) view.addEventListener(kind, say);
      box.setAttribute("data-drawn", "");
    },
    (error) => { box.textContent = "This chart cannot be drawn: " + error.message; console.error(error); },
  );
}

// The chart as it is shown, on white paper: a dark page has a light copy of it, with the same choices.
async function exported(box, kind) {
  const shown = views.get(box);
  if (!shown || !dark.matches) return shown?.toImageURL(kind, 2);
  const copy = document.createElement("div");
  copy.style.cssText = `position: absolute; left: 0; top: 0; visibility: hidden; width: ${box.clientWidth}px`;
  document.body.append(copy);
  try {
    const { view } = await vegaEmbed(copy, specification(box), {
      ...options(box, false), bind: document.createElement("div"),
    });
    const state = shown.getState();
    delete state.signals.background;
    view.setState(state);
    await view.runAsync();
    const address = await view.toImageURL(kind, 2);
    view.finalize();
    return address;
  } finally {
    copy.remove();
  }
}

const charts = [...document.querySelectorAll("[data-spec]")];
const inView = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((entry) => entry.isIntersecting)) {
    inView.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });
charts.forEach((box) => inView.observe(box));
dark.addEventListener("change", () => charts.filter((box) => box.hasAttribute("data-drawn")).forEach(draw));

document.addEventListener("click", (event) => {
  if (!event.target.closest(".chart")) document.getElementById("vg-tooltip-element")?.classList.remove("visible");
});

function save(address, name) {
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
}

// The pictures of a figure below each other in one SVG, with the images that they refer to.
function together(figure) {
  const name = "http://www.w3.org/2000/svg";
  const whole = document.createElementNS(name, "svg");
  let width = 0, height = 0;
  for (const picture of figure.querySelectorAll("svg")) {
    const copy = picture.cloneNode(true), box = picture.viewBox.baseVal;
    copy.setAttribute("y", height);
    for (const use of copy.querySelectorAll("use")) {
      const image = document.querySelector(use.getAttribute("href")).cloneNode(true);
      image.removeAttribute("id");
      image.setAttribute("transform", use.getAttribute("transform"));
      use.replaceWith(image);
    }
    for (const lines of copy.querySelectorAll(".lines")) lines.setAttribute("stroke", "#d9480f");
    const text = document.createElementNS(name, "text");
    text.textContent = picture.parentElement.querySelector("figcaption")?.textContent.trim() ?? "";
    text.setAttribute("y", height + box.height + 12);
    text.setAttribute("style", "font: 10px sans-serif");
    whole.append(copy, text);
    width = Math.max(width, box.width, 5.5 * text.textContent.length);
    height += box.height + 24;
  }
  const paper = document.createElementNS(name, "rect");
  for (const [key, value] of Object.entries({ width, height, fill: "#ffffff" })) paper.setAttribute(key, value);
  const end = document.getElementById("end").cloneNode(true);
  end.firstElementChild.setAttribute("fill", "#d9480f");
  whole.prepend(paper, end);
  for (const [key, value] of Object.entries({ xmlns: name, width, height, viewBox: `0 0 ${width} ${height}` })) {
    whole.setAttribute(key, value);
  }
  return "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(whole));
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-save]");
  if (!button) return;
  const figure = button.closest("figure.part"), shown = figure.querySelector("img.plot");
  const chart = figure.querySelector("[data-spec]");
  if (chart) {
    const address = await exported(chart, button.dataset.save);
    if (address) save(address, `${button.dataset.name}.${button.dataset.save}`);
    return;
  }
  const address = shown ? shown.src : together(figure);
  if (button.dataset.save !== "png" || address.startsWith("data:image/png")) {
    save(address, `${button.dataset.name}.${button.dataset.save}`);
    return;
  }
  const image = new Image();
  image.src = address;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = 2 * image.width;
  canvas.height = 2 * image.height;
  const context = canvas.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  save(canvas.toDataURL("image/png"), `${button.dataset.name}.png`);
});
