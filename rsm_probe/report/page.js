"use strict";
// Charts are drawn when they come into view. The specification of each stands beside it as JSON.
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = new Map();

function draw(box) {
  const spec = JSON.parse(document.getElementById(box.dataset.spec).textContent);
  if (spec.concat && box.clientWidth < 700) spec.columns = 1;
  const menus = box.closest("figure").querySelector(".menus");
  menus.replaceChildren();
  const options = {
    bind: menus,
    actions: false,
    // As the page, so that downloads can be read, too.
    config: {
      background: getComputedStyle(document.body).backgroundColor,
      text: { color: dark.matches ? "#dddddd" : "#222222" },
    },
    renderer: box.dataset.renderer,
    theme: dark.matches ? "dark" : undefined,
  };
  vegaEmbed(box, spec, options).then(
    (drawn) => { views.set(box, drawn.view); box.setAttribute("data-drawn", ""); },
    (error) => { box.textContent = "This chart cannot be drawn: " + error.message; console.error(error); },
  );
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
    for (const line of copy.querySelectorAll(".line")) line.setAttribute("stroke", "#d9480f");
    const text = document.createElementNS(name, "text");
    text.textContent = picture.parentElement.querySelector("figcaption")?.textContent.trim() ?? "";
    text.setAttribute("y", height + box.height + 12);
    text.setAttribute("style", "font: 10px sans-serif");
    whole.append(copy, text);
    width = Math.max(width, box.width, 5.5 * text.textContent.length);
    height += box.height + 24;
  }
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
    const address = await views.get(chart)?.toImageURL(button.dataset.save, 2);
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
