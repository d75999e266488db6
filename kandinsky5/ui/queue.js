"use strict";
// The tab “Queue & history”: asks before files go, shows results large, keeps the keyboard's place in a list.
(() => {
  const DOUBLE_CLICK_MS = 1000;
  const FORM_ACTS = ["edit", "use"];
  const host = () => document.querySelector(".gradio-container") || document.body;
  const buttonOf = (event) => event.target.closest && event.target.closest("button[data-act]");
  const sent = new Map();

  // Two presses of one button in quick succession carry one token.
  function token(key) {
    const last = sent.get(key);
    if (last && performance.now() - last.at < DOUBLE_CLICK_MS) return last.token;
    const made = { token: window.k1.newId(), at: performance.now() };
    sent.set(key, made);
    return made.token;
  }

  function dialog(name, label) {
    const made = document.createElement("dialog");
    made.className = name;
    made.setAttribute("aria-label", label);
    made.addEventListener("close", () => made.remove());
    host().append(made);
    return made;
  }

  function askBeforeDeleting(button, then) {
    const asks = dialog("k1-ask", "Delete this job?");
    asks.innerHTML =
      '<form method="dialog"><p><b></b></p><p></p><div><button value="keep" autofocus>Keep it</button>' +
      '<button value="delete" class="k1-danger">Delete</button></div></form>';
    const what = button.dataset.what;
    const [title, text] = asks.querySelectorAll("p");
    title.firstChild.textContent = `Delete “${button.dataset.text}”?`;
    text.textContent = what ? `With it goes from the disk: ${what}.` : "It has no files; only its settings are forgotten.";
    asks.addEventListener("close", () => { if (asks.returnValue === "delete") then(); });
    asks.showModal();
  }

  function view({ source, kind, text }) {
    const shows = dialog("k1-ask k1-viewer", text);
    shows.innerHTML =
      '<form method="dialog"><div class="k1-stage"></div><p class="k1-what"></p>' +
      '<div><a class="k1-cancel" download>Download</a><button class="k1-cancel" autofocus>Close</button></div></form>';
    const media = document.createElement(kind === "video" ? "video" : "img");
    if (kind === "video") Object.assign(media, { controls: true, autoplay: true, loop: true, muted: true });
    else media.alt = text;
    media.src = source;
    shows.querySelector(".k1-stage").append(media);
    shows.querySelector(".k1-what").textContent = text;
    shows.querySelector("a").href = `${source}${source.includes("?") ? "&" : "?"}download`;
    shows.addEventListener("click", (event) => { if (event.target === shows) shows.close(); });
    shows.showModal();
  }

  // A list is drawn anew when something in it changes; whoever is in it with the keyboard stays there.
  function wireJobs(element, trigger, watch) {
    let held = null;
    element.addEventListener("click", (event) => {
      const button = buttonOf(event);
      if (!button || button.disabled) return;
      const { act, job } = button.dataset;
      const tell = () => trigger(FORM_ACTS.includes(act) ? "select" : "click", { act, job, token: token(act + job) });
      if (act === "view") view(button.dataset);
      else if (act === "delete") askBeforeDeleting(button, tell);
      else tell();
    });
    element.addEventListener("focusin", (event) => {
      const button = buttonOf(event);
      if (!button) return;
      const rows = [...element.querySelectorAll("li")];
      held = { act: button.dataset.act, job: button.dataset.job, row: rows.indexOf(button.closest("li")) };
    });
    element.addEventListener("focusout", (event) => { if (event.relatedTarget) held = null; });
    watch("value", () => {
      const now = document.activeElement;
      if (!held || (now && now !== document.body && !element.contains(now))) return;
      const free = (buttons) => [...buttons].filter((button) => !button.disabled);
      const all = free(element.querySelectorAll("button[data-act]"));
      const ofJob = all.filter((button) => button.dataset.job === held.job);
      const rows = element.querySelectorAll("li");
      const row = rows[Math.min(Math.max(held.row, 0), rows.length - 1)];
      const beside = row ? free(row.querySelectorAll("button[data-act]")) : [];
      const sameAct = (button) => button.dataset.act === held.act;
      const next = ofJob.find(sameAct) || ofJob[0] || beside.find(sameAct) || beside[0] || all[0];
      if (next) next.focus({ preventScroll: true });
    });
  }

  // The running job's last preview: another picture is shown only once it is decoded.
  let wanted = "";
  function runningChanged(element) {
    const card = element.querySelector("[data-job]");
    const frame = document.getElementById("k1-now-picture");
    if (!frame) return;
    const source = (card && card.dataset.picture) || "";
    frame.classList.toggle("k1-on", Boolean(source));
    if (source === wanted) return;
    wanted = source;
    const stage = frame.querySelector(".k1-stage");
    if (!source) return void stage.replaceChildren();
    const picture = new Image();
    picture.alt = "";
    picture.src = source;
    picture.decode().then(() => {
      if (source === wanted) stage.replaceChildren(picture);
    }).catch(() => {
      if (source === wanted) wanted = "";  // asked again with the next look
    });
  }

  // A result or a preview that is gone from the disk leaves a drawing in its place.
  document.addEventListener("error", (event) => {
    const thumb = event.target.closest && event.target.closest(".k1-thumb");
    if (!thumb) return;
    thumb.classList.add("k1-gone");
    if (thumb.dataset.act) Object.assign(thumb, { disabled: true, title: "The file is no longer there." });
  }, true);

  Object.assign(window.k1, { wireJobs, runningChanged });
})();
