// Ask a compiled model about an image. It needs transformers.js and nothing of gracec.
//
//   node answer.mjs DIR --image picture.png --prompt "Where is the cat?"
//
// With --json it answers each line {"image": ..., "question": ...} of standard input by a line.
// A question may come without an image.

import { realpathSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { basename, dirname, resolve, sep } from 'node:path';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';

const USAGE = 'usage: node answer.mjs DIR [--image FILE] --prompt TEXT, or node answer.mjs DIR --json';

class Problem extends Error {}

export async function load(directory) {
  const file = resolve(directory, 'onnx/session.json');
  const text = await readFile(file, 'utf8').catch(() => {
    throw new Problem(`${file} is missing: compile with --format onnx`);
  });
  const { AutoModelForImageTextToText, AutoProcessor, env } = await packages();
  const path = resolve(directory);
  env.allowRemoteModels = false;
  env.localModelPath = dirname(path) + sep;
  const name = basename(path);
  const processor = await AutoProcessor.from_pretrained(name);
  const model = await AutoModelForImageTextToText.from_pretrained(name, {
    session_options: { extra: nested(JSON.parse(text).options) },
  });
  return { processor, model };
}

export async function packages() {
  try {
    return await import('@huggingface/transformers');
  } catch (error) {
    if (error.code !== 'ERR_MODULE_NOT_FOUND') throw error;
    throw new Problem(`@huggingface/transformers is not installed: run npm ci in ${import.meta.dirname}`);
  }
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

// What the model takes for a question about some images.
export async function encode(processor, images, question) {
  const { LlavaProcessor, Tensor } = await packages();
  const content = [...images.map(() => ({ type: 'image' })), { type: 'text', text: question }];
  const prompt = processor.apply_chat_template([{ role: 'user', content }], { add_generation_prompt: true });
  const options = { add_special_tokens: false };
  if (!images.length) {
    // Only with the grids of its images, of none here, does Qwen-VL count on after the prompt.
    return { ...processor.tokenizer(prompt, options), image_grid_thw: new Tensor('int64', [], [0, 3]) };
  }
  return processor instanceof LlavaProcessor ? processor(images, prompt, options) : processor(prompt, images, options);
}

async function answer({ processor, model }, imageFile, question, onText, maxNewTokens) {
  const { TextStreamer } = await packages();
  const images = imageFile ? [await read(imageFile)] : [];
  const started = performance.now();
  const tokens = [];
  let first;
  const streamer = new TextStreamer(processor.tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    token_callback_function: (ids) => {
      first ??= performance.now() - started;
      tokens.push(...ids.map(Number));
    },
    callback_function: onText,
  });
  const inputs = await encode(processor, images, question);
  await model.generate({ ...inputs, max_new_tokens: maxNewTokens, do_sample: false, streamer });
  return { tokens, first, milliseconds: performance.now() - started };
}

export async function read(file) {
  const { RawImage } = await packages();
  const image = await RawImage.read(file).catch((error) => {
    throw new Problem(`${file} cannot be read as an image: ${error.message}`);
  });
  return onWhite(image, RawImage);
}

// As the processors of Python do it; those of transformers.js drop the transparency. Rounds as Pillow does.
function onWhite(image, RawImage) {
  const { data, width, height, channels } = image;
  if (channels !== 4) return image;
  const pixels = new Uint8ClampedArray(width * height * 3);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const from = pixel * channels;
    const alpha = data[from + 3];
    for (let channel = 0; channel < 3; channel++) {
      const sum = 128 * (data[from + channel] * alpha + 255 * (255 - alpha)) + 16384;
      pixels[pixel * 3 + channel] = (((sum >> 8) + sum) >> 8) >> 7;
    }
  }
  return new RawImage(pixels, width, height, 3);
}

async function main() {
  const { positionals, values } = parseArgs({
    allowPositionals: true,
    options: {
      image: { type: 'string' },
      prompt: { type: 'string' },
      json: { type: 'boolean', default: false },
      'max-new-tokens': { type: 'string', default: '64' },
    },
  });
  const maxNewTokens = Number(values['max-new-tokens']);
  if (positionals.length !== 1 || !(values.json || values.prompt) || !(maxNewTokens >= 1)) {
    throw new Problem(USAGE);
  }
  const started = performance.now();
  const loaded = await load(positionals[0]);
  if (!values.json) {
    await answer(loaded, values.image, values.prompt, (text) => process.stdout.write(text), maxNewTokens);
    process.stdout.write('\n');
    return;
  }
  console.log(JSON.stringify({ load: performance.now() - started }));
  for await (const line of createInterface({ input: process.stdin })) {
    const { image, question } = JSON.parse(line);
    let text = '';
    const found = await answer(loaded, image, question, (part) => (text += part), maxNewTokens);
    console.log(JSON.stringify({ answer: text, ...found }));
  }
}

if (process.argv[1] && realpathSync(process.argv[1]) === import.meta.filename) {
  try {
    await main();
  } catch (error) {
    const known = error instanceof Problem || error.code?.startsWith('ERR_PARSE_ARGS');
    console.error(known ? `answer.mjs: ${error.message}` : error);
    process.exitCode = 2;
  }
}
