// The half of transformers_js.py that runs in Node; it calls the model as examples/node does.
//
//   node transformers_js.mjs .../examples/node/answer.mjs DIR TOKENS
//
// In:  {images: [file], question} or {inputs: {name: tensor}}, one a line
// Out: {inputs, tokens} or {error}; a tensor is {type, dims, data} with data in base 64

import { createInterface } from 'node:readline';

const [program, directory, count] = process.argv.slice(2);
const { encode, load, packages, read } = await import(program);
const { Tensor } = await packages();
const { processor, model } = await load(directory);
const ARRAYS = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };

function packed({ type, dims, data }) {
  return { type, dims, data: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('base64') };
}

function unpacked({ type, dims, data }) {
  return new Tensor(type, new ARRAYS[type](Uint8Array.from(Buffer.from(data, 'base64')).buffer), dims);
}

function mapped(values, change) {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, change(value)]));
}

async function made({ images, question }) {
  const found = await encode(processor, await Promise.all(images.map(read)), question);
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value instanceof Tensor));
}

async function answer(asked) {
  const tensors = asked.inputs ? mapped(asked.inputs, unpacked) : await made(asked);
  const inputs = mapped(tensors, packed); // before the model may change them
  const output = await model.generate({ ...tensors, max_new_tokens: Number(count), do_sample: false });
  return { inputs, tokens: Array.from(output.data.slice(tensors.input_ids.dims[1]), Number) };
}

for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await answer(JSON.parse(line)).catch((error) => ({ error: error.message }))));
}
