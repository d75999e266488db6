"use strict";
window.k1 = (() => {
  const DOUBLE_CLICK_MS = 1000;
  let lastToken = "";
  let lastTokenAt = -Infinity;
  let justPressed = false;

  const newId = () =>
    window.crypto && crypto.randomUUID
      ? crypto.randomUUID()
      : `${Date.now()}-${Math.random().toString(36).slice(2)}`;

  // Two presses in quick succession carry one token: the queue makes one job of them.
  function token() {
    const now = performance.now();
    justPressed = true;
    if (now - lastTokenAt > DOUBLE_CLICK_MS) {
      lastToken = newId();
      lastTokenAt = now;
    }
    return lastToken;
  }

  // What was typed stays in the browser's own storage: this tab's first, the last one's for a new tab.
  const FORM_KEY = "k1-form";
  const FORM_VERSION = 1;
  const stores = ["sessionStorage", "localStorage"];
  let remembering = false;

  function readForm() {
    for (const store of stores) {
      try {
        const text = window[store].getItem(FORM_KEY);
        if (text) return text;
      } catch { /* storage is switched off */ }
    }
    return "";
  }

  // Read before any control could write its default over it.
  const formAtLoad = readForm();
  const remembered = () => formAtLoad;
  const startRemembering = () => { remembering = true; };
  const isRemembering = () => remembering;

  function remember(names, values) {
    if (!remembering) return;
    const named = Object.fromEntries(names.map((name, index) => [name, values[index]]));
    const text = JSON.stringify({ version: FORM_VERSION, values: named });
    for (const store of stores) {
      try {
        window[store].setItem(FORM_KEY, text);
      } catch { /* switched off or full: the form is then not kept */ }
    }
  }

  // What becomes of a stopped job: what the dialog was told.
  let nextStop = "save";
  let stopIsChosen = false;
  function stopMode() {
    const mode = nextStop;
    nextStop = "save";
    return mode;
  }

  const dice = () => String(Math.floor(Math.random() * 2 ** 31));
  const active = () => document.querySelector("#k1-progress [data-active]");

  function progressChanged(element) {
    const card = element.querySelector("[data-title]");
    if (!card) return;
    document.title = card.dataset.title;
    if (justPressed && card.dataset.active) {
      justPressed = false;
      // where the columns stand one above the other the progress would be out of sight
      if (window.innerWidth < 900) card.scrollIntoView({ block: "start", behavior: "smooth" });
    }
  }

  function problemChanged(element) {
    document.querySelectorAll(".k1-at-field").forEach((old) => old.remove());
    document.querySelectorAll(".k1-bad").forEach((old) => old.classList.remove("k1-bad"));
    const problem = element.querySelector("[data-field]");
    const field = problem && document.getElementById(`k1-f-${problem.dataset.field}`);
    if (!field || !field.offsetParent) return;
    const line = document.createElement("p");
    line.className = "k1-at-field";
    line.textContent = problem.textContent;
    field.append(line);
    field.classList.add("k1-bad");
    const input = field.querySelector("textarea, input, button");
    if (input) input.focus({ preventScroll: true });
    field.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  function askBeforeStopping() {
    let dialog = document.getElementById("k1-ask");
    if (!dialog) {
      dialog = document.createElement("dialog");
      dialog.id = "k1-ask";
      dialog.setAttribute("aria-labelledby", "k1-ask-text");
      dialog.innerHTML =
        '<form method="dialog"><p id="k1-ask-text">Stop this job? Saved, it can go on later from where it is.</p>' +
        '<div><button value="keep" autofocus>Keep going</button>' +
        '<button value="discard">Drop it</button>' +
        '<button value="decode">Decode what is there</button>' +
        '<button value="save" class="k1-danger">Save to resume</button></div></form>';
      dialog.addEventListener("close", () => {
        if (["discard", "decode", "save"].includes(dialog.returnValue)) {
          nextStop = dialog.returnValue;
          stopIsChosen = true;
          document.getElementById("k1-stop").click();
          stopIsChosen = false;
        }
        dialog.returnValue = "";
      });
      (document.querySelector(".gradio-container") || document.body).append(dialog);
    }
    // Before the first step, and once all are done, there is nothing to choose from.
    dialog.querySelector("[value=decode]").hidden = !document.querySelector("#k1-progress [data-painted]");
    if (!dialog.open) dialog.showModal();
  }

  document.addEventListener("click", (event) => {
    if (stopIsChosen || !event.target.closest || !event.target.closest("#k1-stop")) return;
    if (document.querySelector("#k1-progress [data-kind=expand]")) return; // a text is not worth asking
    event.preventDefault();
    event.stopImmediatePropagation();
    if (active()) askBeforeStopping();
  }, true);

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      const button = document.getElementById("k1-generate");
      if (button && !document.querySelector("dialog[open]")) {
        event.preventDefault();
        event.stopPropagation();
        button.click();
      }
    } else if (event.key === "Escape" && !event.defaultPrevented && active()) {
      const open = document.querySelector("[role=listbox], dialog[open]") || document.fullscreenElement;
      if (!open) {
        event.preventDefault();
        askBeforeStopping();
      }
    }
  }, true);

  // Results in the list move while the pointer or the keyboard is on them.
  const tileVideo = (event) => {
    const tile = event.target.closest && event.target.closest(".k1-tile");
    return tile && tile.querySelector("video");
  };
  for (const [name, act] of [["pointerover", "play"], ["focusin", "play"], ["pointerout", "pause"], ["focusout", "pause"]]) {
    document.addEventListener(name, (event) => {
      const video = tileVideo(event);
      if (!video) return;
      if (act === "play") video.play().catch(() => {});
      else video.pause();
    });
  }

  return {
    token, newId, dice, stopMode, progressChanged, problemChanged,
    remember, remembered, startRemembering, isRemembering,
  };
})();
