"use strict";
// The live preview: pictures change only when a new one is decoded, so that nothing flickers.
(() => {
  const root = () => document.getElementById("k1-preview");
  const part = (selector) => root().querySelector(selector);
  let job = "";
  let steps = [];
  let total = 0;
  let following = true;
  let wanted = "";

  function show() {
    const slider = part("#k1-step");
    const step = steps[Number(slider.value)];
    const text = `step ${step} of ${total}`;
    part("output").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    const address = `/k1/preview/${encodeURIComponent(job)}/${step}`;
    if (address === wanted) return;
    wanted = address;
    const picture = new Image();
    picture.alt = "";
    picture.src = address;
    picture.decode().then(() => {
      if (address === wanted) part(".k1-stage").replaceChildren(picture);
    }).catch(() => {
      if (address === wanted) wanted = "";  // asked again with the next look
    });
  }

  function changed(carrier) {
    const data = carrier.querySelector("[data-job]");
    if (!root()) return;
    root().classList.toggle("k1-on", Boolean(data));
    if (!data) return;
    root().classList.toggle("k1-beside", Boolean(data.dataset.beside));
    root().classList.toggle("k1-is-live", Boolean(data.dataset.live));
    const slider = part("#k1-step");
    if (data.dataset.job !== job) {
      job = data.dataset.job;
      following = true;
      wanted = "";
      part(".k1-stage").replaceChildren();
    }
    const chosen = steps[Number(slider.value)];
    steps = data.dataset.steps.split(" ").map(Number);
    total = Number(data.dataset.total);
    part("figure").setAttribute("aria-label", `Preview: ${data.dataset.prompt}`);
    slider.max = steps.length - 1;
    slider.disabled = steps.length < 2;
    const index = steps.indexOf(chosen);
    slider.value = following || index < 0 ? steps.length - 1 : index;
    show();
  }

  // Who goes back to look at an earlier step stays there; at the right end the newest is followed again.
  document.addEventListener("input", (event) => {
    if (event.target.id !== "k1-step") return;
    following = Number(event.target.value) === steps.length - 1;
    show();
  });

  window.k1.previewChanged = changed;
})();
