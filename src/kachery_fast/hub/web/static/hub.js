// Everything works without this script. With it, a form changes the page in place, so that the place and the focus are
// kept, times are the reader's own, and commands can be copied.
"use strict";

function dress(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const when = new Date(time.dateTime);
    if (!isNaN(when)) {
      time.title = time.textContent;
      time.textContent = when.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
    }
  }
  if (navigator.clipboard) {
    for (const button of root.querySelectorAll("button[data-copy]")) button.hidden = false;
  }
}

async function show(response, focused) {
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  const main = page.querySelector("main");
  if (!main) {
    location.assign(response.url);
    return;
  }
  document.title = page.title;
  document.querySelector("main").replaceWith(main);
  document.querySelector("header.bar").replaceWith(page.querySelector("header.bar"));
  if (response.redirected && response.url !== location.href) history.pushState(null, "", response.url);
  dress(document);
  const again = focused && document.getElementById(focused);
  (again || main).focus({ preventScroll: Boolean(again) });
  if (!again) scrollTo(0, 0);
}

addEventListener("submit", async (event) => {
  const form = event.target;
  if (form.dataset.confirm && !confirm(form.dataset.confirm)) {
    event.preventDefault();
    return;
  }
  // What signs in or out changes the cookie and much of the page: the browser does that.
  if (form.method !== "post" || !new URL(form.action).pathname.startsWith("/do/")) return;
  event.preventDefault();
  const button = event.submitter;
  const data = new URLSearchParams(new FormData(form));
  if (button && button.name) data.append(button.name, button.value);
  if (button) button.disabled = true;
  try {
    await show(await fetch(form.action, { method: "POST", body: data }), button && button.id);
  } catch {
    if (button) button.disabled = false;
    alert("The hub could not be reached. Nothing is known of whether it was done; look again in a moment.");
  }
});

addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
});

// Parts that show what goes on come anew, as long as somebody looks.
async function renew(part) {
  if (document.hidden || part.contains(document.activeElement)) return;
  try {
    const response = await fetch(part.dataset.live);
    if (response.ok && !response.redirected) part.innerHTML = await response.text();
  } catch {
    // The hub is away; what is shown stays, and the next try may succeed.
  }
}

setInterval(() => { for (const part of document.querySelectorAll("[data-live]")) renew(part); }, 2000);

addEventListener("popstate", () => location.reload());

dress(document);
