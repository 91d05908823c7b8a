// The model, in a thread of its own so that the page stays responsive.
//
// In:  {load: device}, once; then {ask: {image: Blob, question}}, one at a time
// Out: {progress: {loaded, total}}, {ready}, {text}, {answer}, {error}

const here = new URL('./', import.meta.url);
const MAX_NEW_TOKENS = 64;
let library, processor, model;

onmessage = async ({ data }) => {
  try {
    if (data.load) postMessage({ ready: await load(data.load) });
    else postMessage({ answer: await answer(data.ask) });
  } catch (error) {
    postMessage({ error: error.message ?? String(error) });
  }
};

async function load(device) {
  const started = performance.now();
  if (device === 'webgpu' && !(await navigator.gpu?.requestAdapter())) {
    throw new Error('This browser offers no WebGPU here. Choose WebAssembly.');
  }
  const session = await sessionFile();
  const sizes = await Promise.all(Object.keys(session.sha256).map((name) => sizeOf(`onnx/${name}`)));
  const total = sizes.reduce((sum, size) => sum + size, 0);
  library = await packages();
  const { AutoModelForImageTextToText, AutoProcessor } = library;
  const loaded = {};
  processor = await AutoProcessor.from_pretrained('model');
  model = await AutoModelForImageTextToText.from_pretrained('model', {
    device,
    session_options: { extra: nested(session.options) },
    progress_callback: ({ status, file, loaded: bytes }) => {
      if (status !== 'progress' || !file.includes('.onnx')) return;
      loaded[file] = bytes;
      const sum = Object.values(loaded).reduce((a, b) => a + b, 0);
      postMessage({ progress: { loaded: Math.min(sum, total), total } });
    },
  });
  const threads = device === 'wasm' ? library.env.backends.onnx.wasm.numThreads : undefined;
  return { device, session, total, threads, milliseconds: performance.now() - started };
}

async function answer({ image, question }) {
  const started = performance.now();
  let first;
  const tokens = [];
  const streamer = new library.TextStreamer(processor.tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    token_callback_function: (ids) => {
      first ??= performance.now() - started;
      tokens.push(...ids.map(Number));
    },
    callback_function: (text) => postMessage({ text }),
  });
  const content = [{ type: 'image' }, { type: 'text', text: question }];
  const prompt = processor.apply_chat_template([{ role: 'user', content }], { add_generation_prompt: true });
  const images = [await read(image)];
  const options = { add_special_tokens: false };
  const inputs = await (processor instanceof library.LlavaProcessor
    ? processor(images, prompt, options)
    : processor(prompt, images, options));
  await model.generate({ ...inputs, max_new_tokens: MAX_NEW_TOKENS, do_sample: false, streamer });
  return { tokens, first, milliseconds: performance.now() - started };
}

// On white where it is transparent, as the processors of Python do it; those of transformers.js drop that.
async function read(blob) {
  const bitmap = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext('2d');
  context.fillStyle = 'white';
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  return library.RawImage.fromCanvas(canvas);
}

async function packages() {
  let found;
  try {
    found = await import('./node_modules/@huggingface/transformers/dist/transformers.min.js');
  } catch {
    throw new Error('The packages of this page are missing. Run npm ci in its folder.');
  }
  const { env } = found;
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.useBrowserCache = false; // it would keep a model that has been compiled again since
  env.localModelPath = here.pathname;
  env.backends.onnx.wasm.wasmPaths = new URL('node_modules/onnxruntime-web/dist/', here).href;
  return found;
}

async function sessionFile() {
  const response = await fetch(new URL('model/onnx/session.json', here));
  if (!response.ok) {
    throw new Error('There are no ONNX graphs: model/onnx/session.json is missing. Compile with --format onnx.');
  }
  return response.json();
}

async function sizeOf(file) {
  const response = await fetch(new URL(`model/${file}`, here), { method: 'HEAD' });
  if (!response.ok) throw new Error(`model/${file} is missing. Copy the directory again, or compile it again.`);
  return Number(response.headers.get('Content-Length'));
}

// {"session.name": "1"} -> {session: {name: "1"}}, as onnxruntime's JavaScript takes it.
function nested(options) {
  const found = {};
  for (const [key, value] of Object.entries(options)) {
    const [group, name] = key.split('.');
    (found[group] ??= {})[name] = value;
  }
  return found;
}
