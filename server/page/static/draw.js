// The first page: a prompt becomes a job, its events become a picture.

import {
  $,
  Problem,
  announce,
  api,
  copy,
  cost,
  curl,
  duration,
  facts,
  make,
  reveal,
  showChip,
  showPrice,
  showProblem,
  token,
} from "./base.js";

const form = $("draw");
const fields = form.elements;
const frame = $("frame");
const empty = [...frame.childNodes];
const PREVIEWS = 4;
const EARLIER = 24; // pictures kept on the page

let job = null; // the one that runs
let last = null; // the request of the picture that is shown
let start = null; // the picture to start from, as an ImageBitmap

// --- The form ---

/** [width, height] of the shape that is chosen: of about the model's area, in sixteens. */
function size() {
  if (fields.shape.value === "own") return [Number(fields.width.value), Number(fields.height.value)];
  const [across, down] = fields.shape.value.split(":").map(Number);
  const area = Number(form.dataset.width) * Number(form.dataset.height);
  const sixteens = (side) => Math.max(16, Math.round(side / 16) * 16);
  return [sixteens(Math.sqrt((area * across) / down)), sixteens(Math.sqrt((area * down) / across))];
}

/** What the form asks for, as the API wants it. */
function request() {
  const [width, height] = size();
  const body = { prompt: fields.prompt.value.trim(), width, height, steps: Number(fields.steps.value) };
  if (fields.seed.value !== "") body.seed = Number(fields.seed.value);
  if (Number(fields.guidance.value) > 0) body.guidance = Number(fields.guidance.value);
  if (fields.negative.value.trim()) body.negative_prompt = fields.negative.value.trim();
  if (Number(fields.n.value) > 1) body.n = Number(fields.n.value);
  if (fields.model?.selectedIndex > 0) body.model = fields.model.value;
  if (start) Object.assign(body, { image: cropped(start, width, height), strength: Number(fields.strength.value) });
  return body;
}

/** The middle of a picture at this size, as a data: URL; lossy, as 8 MB are the most that a request may have. */
function cropped(bitmap, width, height) {
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.fillStyle = "#fff"; // under what is transparent
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  return canvas.toDataURL("image/webp", 0.95); // PNG where the browser makes no WebP
}

async function startFrom(blob) {
  try {
    start = await createImageBitmap(blob);
  } catch {
    showProblem(
      $("problem"),
      new Problem({
        title: "This file is not a picture",
        detail: "PNG, JPEG, WebP and what else your browser shows are fine.",
      }),
    );
    return;
  }
  URL.revokeObjectURL($("thumb").src);
  $("thumb").src = URL.createObjectURL(blob);
  $("started").hidden = false;
  $("start").open = true;
  announce("It starts from this picture");
}

function forget() {
  start = null;
  $("file").value = "";
  $("started").hidden = true;
  $("file").focus();
}

fields.shape.addEventListener("change", () => {
  $("own").hidden = fields.shape.value !== "own";
});
fields.strength.addEventListener("input", () => {
  $("strength-shown").value = fields.strength.value;
});
$("file").addEventListener("change", () => $("file").files[0] && startFrom($("file").files[0]));
$("forget").addEventListener("click", forget);
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    startFrom(file);
  }
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault(); // a picture beside the field would replace the page
  const file = event.dataTransfer.files[0];
  if (file) startFrom(file);
});
for (const button of document.querySelectorAll(".try")) {
  button.addEventListener("click", () => {
    fields.prompt.value = button.textContent;
    fields.prompt.focus();
  });
}
fields.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

// What was written survives a way to the account and back.
const KEPT = ["prompt", "negative", "shape", "steps", "guidance"];
try {
  for (const [name, value] of Object.entries(JSON.parse(sessionStorage.getItem("draw") ?? "{}"))) {
    if (KEPT.includes(name)) fields[name].value = value;
  }
  fields.shape.dispatchEvent(new Event("change"));
} catch {
  /* nothing kept */
}
addEventListener("pagehide", () => {
  try {
    sessionStorage.setItem("draw", JSON.stringify(Object.fromEntries(KEPT.map((name) => [name, fields[name].value]))));
  } catch {
    /* not kept then */
  }
});

// --- A job ---

form.addEventListener("submit", (event) => {
  event.preventDefault();
  draw(request());
});

async function draw(body) {
  if (job) return;
  const run = (job = { id: token(), started: performance.now(), end: () => {} });
  showProblem($("problem"), null, form);
  $("result").hidden = true;
  cells(body);
  progress("Asking the server");
  $("busy").hidden = false;
  $("cancel").disabled = false;
  $("go").disabled = true;
  const clock = setInterval(() => {
    $("clock").textContent = `${((performance.now() - run.started) / 1000).toFixed(0)} s`;
  }, 250);
  reveal($("stage"));
  try {
    const previews = Math.min(PREVIEWS, Math.max(0, body.steps - 1));
    const submitted = await api("/api/jobs", {
      body: { service: "zimage", ...body, partial_images: previews },
      headers: { "Idempotency-Key": run.id }, // one that is sent twice by the network is drawn once
    });
    run.urls = submitted.urls;
    if (run.cancelled) cancel();
    const done = await watch(run, submitted);
    if (done.status === "completed") show(body, done);
    else if (done.status === "failed") throw new Problem(done.problem ?? { title: "It failed" });
    else {
      frame.replaceChildren(...empty);
      frame.classList.remove("many");
      announce("Cancelled. It costs nothing.");
    }
  } catch (error) {
    frame.replaceChildren(...empty);
    frame.classList.remove("many");
    error.param = { negative_prompt: "negative", image: "file" }[error.param] ?? error.param; // the form's names
    showProblem($("problem"), error, form);
  } finally {
    clearInterval(clock);
    job = null;
    $("clock").textContent = "";
    $("busy").hidden = true;
    $("go").disabled = false;
    showChip();
  }
}

/** The job as it has ended. By its events; by asking for it where they do not come through. */
function watch(run, submitted) {
  return new Promise((resolve, reject) => {
    const source = new EventSource(submitted.urls.events);
    const on = (name, act) => source.addEventListener(name, (event) => act(JSON.parse(event.data)));
    const end = (done) => {
      source.close();
      resolve(done);
    };
    on("job.queued", queued);
    on("job.progress", running);
    on("image_generation.partial_image", preview);
    for (const name of ["job.completed", "job.failed", "job.cancelled"]) on(name, end);
    source.onerror = async () => {
      // A line that was cut is taken up again by the browser; one that was refused stays closed.
      if (source.readyState !== EventSource.CLOSED) return;
      try {
        for (;;) {
          const now = await api(submitted.urls.self);
          if (now.status === "queued") queued(now);
          else if (now.status === "running") running(now.progress);
          else return end(now);
          await new Promise((wake) => setTimeout(wake, 1000));
        }
      } catch (error) {
        reject(error);
      }
    };
  });
}

async function cancel() {
  if (!job) return;
  job.cancelled = true;
  $("cancel").disabled = true;
  $("status").textContent = "Cancelling";
  try {
    if (job.urls) await api(job.urls.cancel, { method: "POST" });
  } catch (error) {
    showProblem($("problem"), error);
    $("cancel").disabled = false;
  }
}
$("cancel").addEventListener("click", cancel);

// --- What it looks like ---

/** Room for the pictures of a request, at their shape, so that nothing moves when they come. */
function cells({ width, height, n = 1 }) {
  frame.classList.toggle("many", n > 1);
  frame.replaceChildren(
    ...Array.from({ length: n }, () => {
      const cell = make("div", { className: "cell" });
      cell.style.aspectRatio = `${width} / ${height}`;
      // A small one stays sharp, a tall one in view.
      cell.style.maxWidth = `min(${Math.max(2 * width, 320)}px, ${((72 * width) / height).toFixed(1)}vh)`;
      return cell;
    }),
  );
}

function picture(index, source, text) {
  const cell = frame.children[index];
  if (!cell) return;
  if (!cell.firstChild) cell.append(make("img"));
  Object.assign(cell.firstChild, { src: source, alt: text });
}

function progress(text, step = null, count = null) {
  if ($("status").textContent !== text) $("status").textContent = text;
  const bar = $("bar");
  if (count) {
    bar.max = count;
    bar.value = step;
  } else bar.removeAttribute("value");
}

function queued({ queue_position: ahead }) {
  progress(ahead > 0 ? `In the queue, ${ahead} ahead` : "In the queue, next");
}

const STAGES = { loading: "Loading the model", encode: "Writing the file", queued: "In the queue" };
function running({ stage, step, step_count: count }) {
  if (job?.cancelled) return;
  if (count && STAGES[stage] === undefined) progress(`Step ${step} of ${count}`, step, count);
  else progress(STAGES[stage] ?? "Drawing", step, count);
}

const KINDS = { iVBOR: "png", "/9j/4": "jpeg" }; // how a file begins, in base64
function preview({ b64_json: data, index = 0, step }) {
  picture(index, `data:image/${KINDS[data.slice(0, 5)] ?? "webp"};base64,${data}`, `Preview after step ${step}`);
}

function show(body, done) {
  const { images } = done.result;
  images.forEach((image, i) => picture(i, image.url, body.prompt));
  last = { ...body, seed: images[0].seed };
  $("save").href = images[0].url;
  $("save").download = `${slug(body.prompt)}-${images[0].seed}.${images[0].url.split(".").pop()}`;
  facts($("facts"), {
    Seed: images.map(({ seed }) => seed).join(", "),
    Size: `${images[0].width} × ${images[0].height}`,
    Time: duration(done.timings_ms?.run ?? done.timings_ms?.total),
    Cost: cost(done.cost),
  });
  $("result").hidden = false;
  announce(`The picture is there. Seed ${images[0].seed}.`);
  for (const image of images) keep(image, { ...body, seed: image.seed });
}

function slug(text) {
  return (
    text
      .toLowerCase()
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 48) || "picture"
  );
}

/** A picture among the earlier ones; its button fills the form with what drew it. */
function keep(image, body) {
  const button = make(
    "button",
    { type: "button", title: body.prompt, "aria-label": `Use the prompt and seed of: ${body.prompt}` },
    make("img", { src: image.url, alt: "", loading: "lazy" }),
  );
  button.addEventListener("click", () => {
    fields.prompt.value = body.prompt;
    fields.seed.value = body.seed;
    fields.steps.value = body.steps;
    fields.guidance.value = body.guidance ?? 0;
    fields.negative.value = body.negative_prompt ?? "";
    [fields.width.value, fields.height.value] = [body.width, body.height];
    const shape = [...fields.shape.options].find(({ value }) => {
      fields.shape.value = value;
      return `${size()}` === `${body.width},${body.height}`;
    });
    fields.shape.value = shape?.value ?? "own";
    fields.shape.dispatchEvent(new Event("change"));
    announce("The form has its prompt and seed");
    fields.prompt.focus();
  });
  $("strip").prepend(make("li", {}, button));
  while ($("strip").children.length > EARLIER) $("strip").lastChild.remove();
  $("earlier").hidden = $("strip").children.length < 2;
}

$("again").addEventListener("click", () => {
  const { seed, ...body } = last;
  fields.seed.value = "";
  draw(body);
});
$("onward").addEventListener("click", async () => {
  try {
    startFrom(await (await fetch($("save").href)).blob());
  } catch (error) {
    showProblem($("problem"), error);
  }
});
$("curl").addEventListener("click", () => copy(command(last), $("curl")));

/** The call that draws this picture; with one to start from, from the file start.png. */
function command(body) {
  const { image, ...rest } = body;
  const file = ` \\\n  -o picture.webp`;
  if (!image) return curl("/generate", { ...rest, response_format: "binary" }, file);
  // The picture is too long for an argument, so the body comes from a here-document, in which $ and ` mean something.
  const json = JSON.stringify({ ...rest, response_format: "binary", image: "@" }).replace(/[\\$`]/g, "\\$&");
  return curl(
    "/generate",
    {},
    `${file} <<END\n${json.replace('"image":"@"', '"image":"$(base64 -w0 start.png)"')}\nEND`,
  ).replace("-d '{}'", "-d @-");
}

showPrice("zimage", $("price"));
