(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  // On a touch screen a drag scrolls the page.
  const own = touch ? { dragmode: false } : {};

  const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
  function drawFrontier() {
    const { views, layout } = figures.frontier;
    const view = views[chosen("unit")];
    const xaxis = { ...layout.xaxis, type: chosen("scale"), title: { ...layout.xaxis.title, text: view.title } };
    if (xaxis.type === "linear") xaxis.rangemode = "tozero";
    else Object.assign(xaxis, { dtick: "D2" });
    return Plotly.react("figure-frontier", view.data, { ...layout, ...own, xaxis }, config);
  }
  for (const input of document.querySelectorAll(".controls input")) input.addEventListener("change", drawFrontier);

  const status = document.querySelector(".status");
  async function copy(event) {
    const text = event.currentTarget.dataset.copy;
    try {
      await navigator.clipboard.writeText(text);
      status.textContent = "Copied: " + text;
    } catch {
      // Refused, or an old browser: the command is selected for the reader to copy.
      getSelection().selectAllChildren(event.target.parentElement.querySelector("code"));
      status.textContent = "Selected; copy it with the keyboard.";
    }
  }
  for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", copy);

  const drawn = [drawFrontier()];
  for (const { id, data, layout } of figures.training) {
    drawn.push(Plotly.newPlot("figure-" + id, data, { ...layout, ...own }, { ...config, displayModeBar: false }));
  }
  // Told in milliseconds since the page was opened, for whoever measures it.
  Promise.all(drawn).then(() => requestAnimationFrame(() => {
    document.documentElement.dataset.ready = performance.now().toFixed(0);
  }));
})();
