// Fetches the page again when the server says that something happened, and puts the new content in
// the place of the old. Without this script the page stays readable, and is fetched anew by hand.
"use strict";
const main = document.querySelector("main[data-notices]");
if (main) {
  let source = null;
  let busy = false;
  let again = false;
  const say = (text) => { document.getElementById("live").textContent = text; };

  // What did not change stays: pictures do not flicker, and what a reader opened stays open.
  const exchange = (part, next) => {
    const opened = part.querySelectorAll("details");
    next.querySelectorAll("details").forEach((details, i) => {
      if (opened[i]) details.open = opened[i].open;
    });
    if (part.innerHTML !== next.innerHTML) part.replaceChildren(...next.childNodes);
  };

  const refresh = async () => {
    if (busy) { again = true; return; }
    busy = true;
    try {
      const answer = await fetch(location.pathname, { cache: "no-store" });
      if (!answer.ok) return;
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of document.querySelectorAll("[data-part]")) {
        const next = fresh.querySelector(`[data-part="${part.dataset.part}"]`);
        if (next) exchange(part, next);
      }
    } catch {
      say("connection lost; trying again");
    } finally {
      busy = false;
      if (again) { again = false; refresh(); }
    }
  };

  // A hidden page listens to nothing: browsers keep few connections to one server.
  const listen = () => {
    if (document.hidden) {
      if (source) source.close();
      source = null;
      return;
    }
    if (source) return;
    source = new EventSource(main.dataset.notices);
    source.onopen = () => say("live");
    source.onerror = () => say("connection lost; trying again");
    source.addEventListener("changed", refresh);
    refresh();
  };
  document.addEventListener("visibilitychange", listen);
  listen();
}
