// Asks a TF.js model in Node: rows as JSON on standard input, named answers as JSON in the last line of standard output.
// It is started by mlkit.tfjs.ask_tfjs, as `node ask_tfjs.mjs FOLDER_OF_THE_MODEL FOLDER_WITH_NODE_MODULES`.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [, , folder, installed] = process.argv;
const tf = createRequire(`${installed}/`)("@tensorflow/tfjs");
const source = readFileSync(new URL("host.js", import.meta.url));
const { Host } = await import(`data:text/javascript;base64,${source.toString("base64")}`);
const read = (file) => readFileSync(`${folder}/${file}`);

const { modelTopology, weightsManifest, signature } = JSON.parse(read("model.json"));
const weightData = new Uint8Array(Buffer.concat(weightsManifest.flatMap((group) => group.paths).map(read))).buffer;
const weightSpecs = weightsManifest.flatMap((group) => group.weights);
const load = async () => ({ modelTopology, weightSpecs, weightData, signature, format: "graph-model" });
const model = await tf.loadGraphModel({ load });
const outputs = Object.entries(signature.outputs).sort().map(([, { name }]) => name);

const host = new Host(JSON.parse(read("host.json")));
const found = [];
for (const row of JSON.parse(readFileSync(0))) {
  const encoded = Object.entries(host.encode(row));
  const given = encoded.map(([name, { data, shape }]) => [name, tf.tensor(data, shape)]);
  const answers = [await model.executeAsync(Object.fromEntries(given), outputs)].flat();
  found.push(host.answers(answers.map((answer) => Array.from(answer.dataSync()))));
  for (const tensor of [...given.map(([, each]) => each), ...answers]) tensor.dispose();
}
process.stdout.write(`\n${JSON.stringify(found)}\n`);
