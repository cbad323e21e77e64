/* The theme looks for a global `mermaid` and would otherwise fetch one from another host.
   This stand-in loads our own copy, and only on a page that draws a diagram. */
(function () {
  "use strict";
  const address = new URL("vendor/mermaid/mermaid.min.js", document.currentScript.src);
  let settings = {};
  let loaded = null;

  function load() {
    loaded ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = address.href;
      script.onload = () => {
        window.mermaid.initialize(settings);
        resolve(window.mermaid);
      };
      script.onerror = () => {
        document.documentElement.classList.add("mermaid-failed"); // show the source instead
        reject(new Error("mermaid could not be loaded"));
      };
      document.head.append(script);
    });
    return loaded;
  }

  window.mermaid = {
    initialize(given) {
      settings = given;
    },
    async render(id, text) {
      return (await load()).render(id, text);
    },
  };
})();
