// Predicts rows by a TF.js model in Node: rows as JSON on standard input, named outputs as JSON in the last line of
// standard output. mlkit.export.tfjs.predict_tfjs runs `node predict_tfjs.mjs MODEL_FOLDER FOLDER_WITH_NODE_MODULES`.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [, , folder, installed] = process.argv;
const tf = createRequire(`${installed}/`)("@tensorflow/tfjs");
const source = readFileSync(new URL("preprocessing.js", import.meta.url));
const { Preprocessor } = await import(`data:text/javascript;base64,${source.toString("base64")}`);
const read = (file) => readFileSync(`${folder}/${file}`);

const { modelTopology, weightsManifest, signature } = JSON.parse(read("model.json"));
const weightData = new Uint8Array(Buffer.concat(weightsManifest.flatMap((group) => group.paths).map(read))).buffer;
const weightSpecs = weightsManifest.flatMap((group) => group.weights);
const load = async () => ({ modelTopology, weightSpecs, weightData, signature, format: "graph-model" });
const model = await tf.loadGraphModel({ load });
const outputNames = Object.entries(signature.outputs).sort().map(([, { name }]) => name);

const preprocessor = new Preprocessor(JSON.parse(read("preprocessing.json")));
const predictions = [];
for (const row of JSON.parse(readFileSync(0))) {
  const encoded = Object.entries(preprocessor.encode(row));
  const inputs = encoded.map(([name, { data, shape }]) => [name, tf.tensor(data, shape)]);
  const outputs = [await model.executeAsync(Object.fromEntries(inputs), outputNames)].flat();
  predictions.push(preprocessor.nameOutputs(outputs.map((output) => Array.from(output.dataSync()))));
  for (const tensor of [...inputs.map(([, tensor]) => tensor), ...outputs]) tensor.dispose();
}
process.stdout.write(`\n${JSON.stringify(predictions)}\n`);
