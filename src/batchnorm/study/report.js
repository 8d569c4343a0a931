"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = document.querySelectorAll(".plot");
const seen = (plot) => plot.offsetParent !== null;
const drawn = (plot) => plot.childElementCount > 0;

function fit(plot) {
  delete plot.layout.width;
  Plotly.relayout(plot, { autosize: true });
}

function draw(plot, size) {
  const { data, layout } = figures[plot.dataset.figure];
  const settings = { displayModeBar: false, responsive: true };
  Plotly.newPlot(plot, data, { ...layout, ...size }, settings);
}

/* A plot is drawn when it comes near: it takes its width from the page, and may never be looked at. */
const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting && !drawn(target)) draw(target);
    }
  },
  { rootMargin: "600px" },
);
plots.forEach((plot) => near.observe(plot));

for (const figure of document.querySelectorAll("figure")) {
  const panels = [...figure.querySelectorAll(".panel")];
  const other = (name) => {
    const value = figure.querySelector(`[data-name="${name}"]`)?.value;
    return ({ dataset }) => Boolean(value && dataset[name] && dataset[name] !== value);
  };
  figure.addEventListener("change", () => {
    const [choice, part] = [other("choice"), other("part")];
    for (const panel of panels) {
      panel.hidden = choice(panel);
      panel.classList.toggle("other", part(panel));
      const plot = panel.querySelector(".plot");
      if (seen(plot) && drawn(plot)) fit(plot); // it may have missed a change of the window's
    }
    figure.querySelector(".panels + p").hidden = panels.some(seen);
  });
}

/* Paper has a width of its own, and shows all parts of a choice. */
const closed = document.querySelectorAll(".numbers > details:not([open])");
addEventListener("beforeprint", () => {
  closed.forEach((details) => { details.open = true; });
  for (const plot of plots) {
    if (plot.closest("[hidden]")) continue;
    const size = { width: 330, autosize: false };
    drawn(plot) ? Plotly.relayout(plot, size) : draw(plot, size);
  }
});
addEventListener("afterprint", () => {
  for (const plot of plots) {
    if (seen(plot) && drawn(plot)) fit(plot);
  }
});
