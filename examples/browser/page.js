// What is seen: pictures in, questions to the worker, answers as they come.

const byId = (id) => document.getElementById(id);
const [file, drop, shown, form, question, send, error, answers, state, progress, device] = [
  'file', 'drop', 'shown', 'ask', 'question', 'send', 'error', 'answers', 'state', 'progress', 'device',
].map(byId);
const samples = [...document.querySelectorAll('.samples button')];
const NAMES = { wasm: 'WebAssembly', webgpu: 'WebGPU' };

let worker;
let picture; // Blob
let current; // the entry that is being answered
let ready = false;

function start() {
  worker?.terminate();
  worker = new Worker('worker.js', { type: 'module' });
  worker.onmessage = ({ data }) => {
    const [kind, value] = Object.entries(data)[0];
    hears[kind](value);
  };
  worker.onerror = () => hears.error('The worker of this page does not start. Is worker.js there?');
  ready = false;
  current = undefined;
  state.textContent = 'Loading the model';
  progress.hidden = false;
  progress.removeAttribute('value');
  showError('');
  update();
  worker.postMessage({ load: device.value });
}

const hears = {
  progress({ loaded, total }) {
    progress.value = loaded / total;
    state.textContent = `Loading ${megabytes(loaded)} of ${megabytes(total)}`;
  },
  ready({ device, session, threads, total, milliseconds }) {
    ready = true;
    progress.hidden = true;
    const place = threads > 1 ? `${NAMES[device]}, ${threads} threads` : NAMES[device];
    const kernels = `${session.gates.int4_kernels} INT4 kernels (${session.mode})`;
    state.textContent =
      `${session.family}, ${kernels}, ${megabytes(total)}, on ${place}. Loaded in ${seconds(milliseconds)}.`;
    update();
  },
  text(text) {
    current.querySelector('.answer').append(text);
  },
  answer({ tokens, first, milliseconds }) {
    const rate = (tokens.length - 1) / (milliseconds - first);
    current.querySelector('.figures').textContent = [
      NAMES[device.value],
      `first token ${seconds(first)}`,
      `total ${seconds(milliseconds)}`,
      ...(tokens.length > 1 ? [`${(1000 * rate).toFixed(0)} tokens/s`] : []),
    ].join(' · ');
    Object.assign(current.dataset, { first, milliseconds, tokens: tokens.join(' ') });
    current = undefined;
    update();
  },
  error(message) {
    current?.remove();
    current = undefined;
    if (!ready) {
      progress.hidden = true;
      state.textContent = 'Not loaded';
    }
    showError(message);
    update();
  },
};

async function show(blob, name) {
  try {
    const { width } = await createImageBitmap(blob);
    drop.classList.toggle('small-picture', width < 200);
  } catch {
    showError(`${name} is no picture that this browser can read.`);
    return;
  }
  picture = blob;
  URL.revokeObjectURL(shown.src);
  shown.src = URL.createObjectURL(blob);
  shown.alt = name;
  shown.hidden = false;
  for (const sample of samples) sample.setAttribute('aria-pressed', 'false');
  showError('');
  update();
}

form.onsubmit = (event) => {
  event.preventDefault();
  if (send.disabled) return;
  showError('');
  current = document.createElement('li');
  const small = new Image();
  small.src = URL.createObjectURL(picture);
  small.alt = '';
  current.append(small, paragraph('question', question.value), paragraph('answer'), paragraph('figures', 'Reading the picture'));
  answers.prepend(current);
  update();
  worker.postMessage({ ask: { image: picture, question: question.value } });
};

for (const sample of samples) {
  sample.onclick = async () => {
    const image = sample.querySelector('img');
    await show(await (await fetch(image.src)).blob(), sample.ariaLabel);
    sample.setAttribute('aria-pressed', 'true');
    question.value = sample.dataset.question;
    update();
  };
}

file.onchange = () => file.files[0] && show(file.files[0], file.files[0].name);
device.onchange = start;
addEventListener('dragover', (event) => event.preventDefault());
drop.ondragenter = () => drop.classList.add('over');
drop.ondragleave = (event) => drop.contains(event.relatedTarget) || drop.classList.remove('over');
addEventListener('drop', (event) => {
  event.preventDefault();
  drop.classList.remove('over');
  const [dropped] = event.dataTransfer.files;
  if (dropped) show(dropped, dropped.name);
});
addEventListener('paste', (event) => {
  const [pasted] = event.clipboardData.files;
  if (pasted) show(pasted, 'Pasted picture');
});

function update() {
  send.disabled = !(ready && picture && !current);
  send.textContent = current ? '…' : 'Ask';
}

function showError(message) {
  error.textContent = message;
  error.hidden = !message;
}

function paragraph(name, text = '') {
  const made = document.createElement('p');
  made.className = name;
  made.textContent = text;
  return made;
}

const seconds = (milliseconds) => (milliseconds < 1000 ? `${milliseconds.toFixed(0)} ms` : `${(milliseconds / 1000).toFixed(1)} s`);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

const wanted = new URLSearchParams(location.search).get('device');
if (wanted in NAMES) device.value = wanted;
start();
