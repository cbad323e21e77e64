/* Copy buttons. One listener on the document, so that instant navigation cannot lose it. */
(function () {
  "use strict";
  const words = document.documentElement.lang.startsWith("zh")
    ? { copy: "复制", copied: "已复制", failed: "复制失败，请手动选取" }
    : { copy: "Copy", copied: "Copied", failed: "Copying failed; please select by hand" };
  const waiting = new WeakMap();

  async function write(text) {
    if (navigator.clipboard && window.isSecureContext) {
      try {
        await navigator.clipboard.writeText(text);
        return true;
      } catch {
        // Not permitted: the old way may still work.
      }
    }
    const area = document.createElement("textarea");
    area.value = text;
    area.readOnly = true;
    area.style.cssText = "position:fixed;top:0;left:-100vw;opacity:0";
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    let done = false;
    try {
      done = document.execCommand("copy");
    } catch {
      done = false;
    }
    area.remove();
    focused?.focus?.({ preventScroll: true });
    return done;
  }

  function announce(text) {
    let region = document.getElementById("mdproof-status");
    if (!region) {
      region = document.createElement("div");
      region.id = "mdproof-status";
      region.setAttribute("role", "status");
      region.setAttribute("aria-live", "polite");
      document.body.append(region);
    }
    region.textContent = "";
    requestAnimationFrame(() => (region.textContent = text));
  }

  function confirm(button, done) {
    const label = waiting.get(button)?.label ?? button.textContent;
    clearTimeout(waiting.get(button)?.timer);
    button.style.minWidth = `${button.getBoundingClientRect().width}px`; // no jump
    button.textContent = done ? words.copied : "×";
    button.dataset.mdproofDone = String(done);
    announce(done ? words.copied : words.failed);
    const timer = setTimeout(() => {
      button.textContent = label;
      delete button.dataset.mdproofDone;
      button.style.minWidth = "";
      waiting.delete(button);
    }, 1600);
    waiting.set(button, { label, timer });
  }

  /** What a listing says, without line numbers. */
  function listing(button) {
    const code = button.parentElement.querySelector("pre code, pre").cloneNode(true);
    code.querySelectorAll(".linenos, .linenodiv, .mdproof-copy").forEach((node) => node.remove());
    return code.textContent.replace(/\n+$/, "\n");
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.(".mdproof-copy");
    if (!button) return;
    const given = button.getAttribute("data-mdproof-copy");
    confirm(button, await write(given ?? listing(button)));
  });

  /** Ordinary listings get a button; boxes that scroll can be reached by keyboard. */
  function prepare() {
    for (const box of document.querySelectorAll(".md-content .highlight")) {
      if (box.closest(".mdproof, .doc-signature, .highlighttable") || box.matches(".doc-signature")) continue;
      if (!box.querySelector("pre") || box.querySelector(".mdproof-copy")) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "mdproof-copy mdproof-copy--listing";
      button.textContent = words.copy;
      box.append(button);
    }
    for (const box of document.querySelectorAll(".mdproof-output pre, .katex-display")) {
      if (box.scrollWidth > box.clientWidth + 1) {
        box.tabIndex = 0;
      } else {
        box.removeAttribute("tabindex");
      }
    }
  }

  /** Films play by their own style sheet, once; here: when they come into view, and again on demand. */
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let plays = 0;

  function play(film) {
    for (const image of film.querySelectorAll("img")) {
      image.dataset.mdproofSrc ??= image.getAttribute("src");
      // Another address is another document, whose clock begins anew.
      if (image.checkVisibility()) image.src = `${image.dataset.mdproofSrc}?play=${++plays}`;
    }
  }

  const seen = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        if (!still.matches) play(target);
      }
    },
    { threshold: 0.6 },
  );

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".mdproof-replay");
    if (button) play(button.closest(".mdproof-film"));
  });

  function projector() {
    for (const film of document.querySelectorAll(".mdproof-film")) {
      film.querySelector(".mdproof-replay").hidden = still.matches;
      seen.observe(film);
    }
  }

  function ready() {
    prepare();
    projector();
  }

  if (window.document$) {
    window.document$.subscribe(ready); // once now, and after each instant navigation
  } else if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", ready);
  } else {
    ready();
  }
})();
