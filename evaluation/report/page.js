(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touch = matchMedia("(pointer: coarse)").matches;
  const narrow = matchMedia("(max-width: 600px)").matches;
  const buttons = [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
  const config = { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover", modeBarButtons: buttons };
  // On a touch screen a drag scrolls the page.
  const own = touch ? { dragmode: false } : {};

  const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
  function drawFrontier() {
    const { views, layout } = figures.frontier;
    const view = views[chosen("unit")];
    const xaxis = { ...layout.xaxis, type: chosen("scale"), title: { ...layout.xaxis.title, text: view.title } };
    if (xaxis.type === "linear") xaxis.rangemode = "tozero";
    else xaxis.tickvals = [-3, -2, -1, 0, 1, 2, 3, 4, 5].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));
    xaxis.tickformat = ",~g";
    return Plotly.react("figure-frontier", view.data, { ...layout, ...own, xaxis }, config);
  }

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

  const waiting = new Map(figures.small.map((figure) => [document.getElementById("figure-" + figure.id), figure]));
  function drawSmall(element) {
    const { data, layout } = waiting.get(element);
    waiting.delete(element);
    Plotly.newPlot(element, data, { ...layout, ...own }, { ...config, displayModeBar: false });
  }
  // Figures further down are drawn when the reader comes near them, and all of them before printing.
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting && waiting.has(target)) drawSmall(target);
  }, { rootMargin: "600px" });
  for (const element of waiting.keys()) near.observe(element);
  addEventListener("beforeprint", () => [...waiting.keys()].forEach(drawSmall));

  for (const input of document.querySelectorAll(".controls input")) input.addEventListener("change", drawFrontier);
  // Told in milliseconds since the page was opened, for whoever measures it.
  drawFrontier().then(() => requestAnimationFrame(() => {
    document.documentElement.dataset.ready = performance.now().toFixed(0);
  }));
})();
