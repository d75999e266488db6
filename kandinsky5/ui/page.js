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
  let started = false;

  // What the user set for the whole studio; without an answer the page is as if nothing were set.
  const settings = fetch("k1/page", { cache: "no-store" })
    .then((answer) => answer.json())
    .catch(() => ({ theme: "system", rememberForm: true }));
  settings.then(followSettings);

  const systemIsDark = window.matchMedia("(prefers-color-scheme: dark)");
  let theme = "system";
  function showTheme() {
    const dark = theme === "dark" || (theme === "system" && systemIsDark.matches);
    document.body.classList.toggle("dark", dark);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    document.body.style.background = "var(--body-background-fill)";
  }
  // gradio follows the system at each of its changes: what was set has the last word.
  systemIsDark.addEventListener("change", () => setTimeout(showTheme));

  function followSettings(given) {
    theme = given.theme;
    showTheme();
    if (!given.rememberForm) forgetForm();
  }

  // Saved here: at once in this page and in the browser's others.
  const otherTabs = window.BroadcastChannel ? new BroadcastChannel("k1-settings") : null;
  function takeSettings(given) {
    remembering = given.rememberForm;
    followSettings(given);
  }
  if (otherTabs) otherTabs.onmessage = (event) => takeSettings(event.data);
  function settingsSaved(element) {
    const line = element.querySelector("[data-look]");
    if (!line) return;
    const given = JSON.parse(line.dataset.look);
    takeSettings(given);
    if (otherTabs) otherTabs.postMessage(given);
  }

  function readForm() {
    for (const store of stores) {
      try {
        const text = window[store].getItem(FORM_KEY);
        if (text) return text;
      } catch { /* storage is switched off */ }
    }
    return "";
  }

  function forgetForm() {
    for (const store of stores) {
      try {
        window[store].removeItem(FORM_KEY);
      } catch { /* storage is switched off */ }
    }
  }

  // Read before any control could write its default over it.
  const formAtLoad = readForm();
  const remembered = async () => ((await settings).rememberForm ? formAtLoad : "");
  const startRemembering = async () => {
    remembering = (await settings).rememberForm;
    started = true;
  };
  const isStarted = () => started;
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

  // A file that the browser keeps; what is gone by now is answered with 404, and the page says so.
  function fetchFile(path, name) {
    if (name) {
      const link = document.createElement("a");
      link.href = `${path.slice(1)}?name=${encodeURIComponent(name)}`;
      link.download = "";
      link.click();
    }
    return [name];
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

  // Each Stop, and the card of the job that it stops.
  const CARDS = { "k1-stop": "#k1-progress", "k1-queue-stop": "#k1-now" };
  let asking = "k1-stop";

  function askBeforeStopping(button = "k1-stop") {
    asking = button;
    let dialog = document.getElementById("k1-ask");
    if (!dialog) {
      dialog = document.createElement("dialog");
      dialog.id = "k1-ask";
      dialog.className = "k1-ask";
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
          document.getElementById(asking).click();
          stopIsChosen = false;
        }
        dialog.returnValue = "";
      });
      (document.querySelector(".gradio-container") || document.body).append(dialog);
    }
    // Before the first step, and once all are done, there is nothing to choose from.
    dialog.querySelector("[value=decode]").hidden = !document.querySelector(`${CARDS[button]} [data-painted]`);
    if (!dialog.open) dialog.showModal();
  }

  document.addEventListener("click", (event) => {
    const stop = event.target.closest && event.target.closest(Object.keys(CARDS).map((id) => `#${id}`).join());
    if (stopIsChosen || !stop) return;
    const card = CARDS[stop.id];
    if (document.querySelector(`${card} [data-kind=expand]`)) return; // a text is not worth asking
    event.preventDefault();
    event.stopImmediatePropagation();
    if (document.querySelector(`${card} [data-active]`)) askBeforeStopping(stop.id);
  }, true);

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      // the one that is there: while a waiting job is changed Generate is not
      const button = document.getElementById("k1-replace") || document.getElementById("k1-generate");
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

  // gradio gives each button of a choice a name of its own, so that the browser's arrow keys do nothing there.
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  document.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    const field = step && event.target.matches(".k1-field input[type=radio]") && event.target.closest(".k1-field");
    if (!field || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const buttons = [...field.querySelectorAll("input[type=radio]")];
    const next = buttons[(buttons.indexOf(event.target) + step + buttons.length) % buttons.length];
    next.focus();
    next.click();
  });

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
    remember, remembered, startRemembering, isRemembering, isStarted, settingsSaved, fetchFile,
  };
})();
