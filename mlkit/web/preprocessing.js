// Client-side preprocessing: from raw values to the inputs of a converted network, and from its outputs to named outputs.
// mlkit.export.numpy_preprocessing does the same in Python; tests/export/test_preprocessing.py holds both to one table.

const MASK = (1n << 64n) - 1n;
const [K0, K1, K2] = [0xc3a5c85c97cb3127n, 0xb492b66fbe98f273n, 0x9ae16a3b2f90404fn];
const float = Math.fround;
const asBytes = (text) => new TextEncoder().encode(text);

// ---- FarmHash's Fingerprint64, SipHash-2-4, and crosses

const rotate = (value, bits) => {
  value &= MASK;
  return (value >> bits) | ((value << (64n - bits)) & MASK);
};
const shiftMix = (value) => {
  value &= MASK;
  return value ^ (value >> 47n);
};
const fetchWord = (data, start, size = 8) => {
  if (start < 0) start += data.length;
  let value = 0n;
  for (let index = Math.min(size, data.length - start) - 1; index >= 0; index--) {
    value = (value << 8n) | BigInt(data[start + index]);
  }
  return value;
};
const hashLen16 = (first, second, factor) => {
  const mixed = shiftMix((first ^ second) * factor);
  return (shiftMix((second ^ mixed) * factor) * factor) & MASK;
};

function hash0To16(data) {
  const size = BigInt(data.length);
  const factor = K2 + 2n * size;
  if (size >= 8n) {
    const first = (fetchWord(data, 0) + K2) & MASK;
    const last = fetchWord(data, -8);
    return hashLen16((rotate(last, 37n) * factor + first) & MASK, ((rotate(first, 25n) + last) * factor) & MASK, factor);
  }
  if (size >= 4n) return hashLen16(size + (fetchWord(data, 0, 4) << 3n), fetchWord(data, -4, 4), factor);
  if (size === 0n) return K2;
  const head = BigInt(data[0]) + (BigInt(data[data.length >> 1]) << 8n);
  const tail = size + (BigInt(data[data.length - 1]) << 2n);
  return (shiftMix((head * K2) ^ (tail * K0)) * K2) & MASK;
}

function hash17To64(data) {
  const size = BigInt(data.length);
  const factor = K2 + 2n * size;
  const first = (fetchWord(data, 0) * (size <= 32n ? K1 : K2)) & MASK;
  const [second, last, before] = [fetchWord(data, 8), fetchWord(data, -8) * factor, fetchWord(data, -16) * K2];
  const sum = (rotate(first + second, 43n) + rotate(last, 30n) + before) & MASK;
  const other = (first + rotate(second + K2, 18n) + last) & MASK;
  if (size <= 32n) return hashLen16(sum, other, factor);
  const inner = hashLen16(sum, other, factor);
  const [third, fourth] = [(fetchWord(data, 16) * factor) & MASK, fetchWord(data, 24)];
  const [fifth, sixth] = [(sum + fetchWord(data, -32)) * factor, (inner + fetchWord(data, -24)) * factor];
  const left = (rotate(third + fourth, 43n) + rotate(fifth, 30n) + sixth) & MASK;
  return hashLen16(left, (third + rotate(fourth + first, 18n) + fifth) & MASK, factor);
}

function weakHash32(data, start, first, second) {
  const [w, x, y, z] = [0, 8, 16, 24].map((offset) => fetchWord(data, start + offset));
  first += w;
  second = rotate(second + first + z, 21n);
  const partial = first;
  first += x + y;
  return [(first + z) & MASK, (second + rotate(first, 44n) + partial) & MASK];
}

function hash65AndMore(data) {
  const size = data.length;
  let x = (81n * K2 + fetchWord(data, 0)) & MASK;
  let y = (81n * K1 + 113n) & MASK;
  let z = (shiftMix(y * K2 + 113n) * K2) & MASK;
  let [v, w] = [[0n, 0n], [0n, 0n]];
  const round = (start, factor, last) => {
    x = (rotate(x + y + v[0] + fetchWord(data, start + 8), 37n) * factor) & MASK;
    y = (rotate(y + v[1] + fetchWord(data, start + 48), 42n) * factor) & MASK;
    x ^= (last ? w[1] * 9n : w[1]) & MASK;
    y = (y + (last ? v[0] * 9n : v[0]) + fetchWord(data, start + 40)) & MASK;
    z = (rotate(z + w[0], 33n) * factor) & MASK;
    v = weakHash32(data, start, v[1] * factor, x + w[0]);
    w = weakHash32(data, start + 32, z + w[1], y + fetchWord(data, start + 16));
  };
  for (let start = 0; start < Math.floor((size - 1) / 64) * 64; start += 64) {
    round(start, K1, false);
    [z, x] = [x, z];
  }
  const factor = K1 + ((z & 0xffn) << 1n);
  w[0] += BigInt((size - 1) % 64);
  v[0] += w[0];
  w[0] += v[0];
  round(size - 64, factor, true);
  [z, x] = [x, z];
  const left = (hashLen16(v[0], w[0], factor) + shiftMix(y) * K0 + z) & MASK;
  return hashLen16(left, (hashLen16(v[1], w[1], factor) + x) & MASK, factor);
}

export function fingerprint64(data) {
  return data.length <= 16 ? hash0To16(data) : data.length <= 64 ? hash17To64(data) : hash65AndMore(data);
}

function sipRounds([a, b, c, d], count) {
  for (; count; count--) {
    [a, c] = [(a + b) & MASK, (c + d) & MASK];
    [b, d] = [rotate(b, 51n) ^ a, rotate(d, 48n) ^ c];
    a = rotate(a, 32n);
    [a, c] = [(a + d) & MASK, (c + b) & MASK];
    [d, b] = [rotate(d, 43n) ^ a, rotate(b, 47n) ^ c];
    c = rotate(c, 32n);
  }
  return [a, b, c, d];
}

export function siphash(data, salt) {
  const key = BigInt(salt) & MASK;
  const starts = [0x736f6d6570736575n, 0x646f72616e646f6dn, 0x6c7967656e657261n, 0x7465646279746573n];
  let state = starts.map((start) => key ^ start);
  const padded = new Uint8Array(Math.ceil((data.length + 1) / 8) * 8);
  padded.set(data);
  padded[padded.length - 1] = data.length % 256;
  for (let start = 0; start < padded.length; start += 8) {
    const block = fetchWord(padded, start);
    state[3] ^= block;
    state = sipRounds(state, 2);
    state[0] ^= block;
  }
  state[2] ^= 0xffn;
  return sipRounds(state, 4).reduce((left, right) => left ^ right);
}

function crossPair(first, second, bins) {
  const factor = 0xc6a4a7935bd1e995n;
  let mixed = 0xdecafcaffen;
  for (const row of [first, second]) {
    mixed ^= factor ^ ((shiftMix(row * factor) * factor) & MASK);
    mixed = shiftMix(shiftMix(mixed * factor) * factor);
  }
  return mixed % bins;
}

export function crossRows(rows, buckets) {
  const numbers = rows.map(BigInt);
  const last = numbers.pop();
  const first = numbers.reduce((left, right) => crossPair(left, right, 2147483647n));
  return Number(crossPair(first, last, BigInt(buckets)));
}

// ---- words and dates

export function splitWords(text, length) {
  const words = text.toLowerCase().split(/[\p{Z}\p{Cc}\p{P}]+/u).filter(Boolean).slice(0, length);
  return [...words, ...Array(length - words.length).fill("")];
}

const MOMENT = new RegExp(
  "^ *([0-9]{4})-([0-9]{2})-([0-9]{2})" +
    "(?:[T ]([01][0-9]|2[0-3]):([0-5][0-9])(?::([0-5][0-9](?:\\.[0-9]{1,9})?))?" +
    " ?(?:Z|([+-])(0[0-9]|1[0-4]):?([0-5][0-9]))?)? *$",
);
const DAY = 86_400_000;

export function momentFields(text) {
  const missing = { known: 0, days: 0, time: 0, month: 0, day: 0, weekday: 0, hour: 0, minute: 0 };
  const match = MOMENT.exec(text);
  if (!match) return missing;
  const [year, month, day, hour, minute] = match.slice(1, 6).map((part) => Number(part ?? 0));
  const zone = Number(match[8] ?? 0) * 60 + Number(match[9] ?? 0);
  const begin = new Date(0);
  begin.setUTCFullYear(year, month - 1, day);
  const exists = begin.getUTCFullYear() === year && begin.getUTCMonth() === month - 1 && begin.getUTCDate() === day;
  const utcMinutes = hour * 60 + minute + (match[7] === "-" ? zone : -zone);
  const days = begin.getTime() / DAY + Math.floor(utcMinutes / 1440);
  const utcDate = new Date(days * DAY);
  if (!exists || year < 1 || utcDate.getUTCFullYear() < 1 || utcDate.getUTCFullYear() > 9999) return missing;
  const minutes = ((utcMinutes % 1440) + 1440) % 1440;
  return {
    known: 1,
    days,
    time: float(float(minutes * 60 + float(Number(match[6] ?? 0))) * float(1 / 86_400)),
    month: utcDate.getUTCMonth() + 1,
    day: utcDate.getUTCDate(),
    weekday: (((days + 3) % 7) + 7) % 7,
    hour: Math.floor(minutes / 60),
    minute: minutes % 60,
  };
}

// ---- rows and columns

function rowLookup(encoder) {
  const rows = new Map((encoder.vocabulary ?? []).map((text, index) => [text, index + encoder.first]));
  if (encoder.empty !== null) rows.set("", encoder.empty);
  const [start, count] = encoder.vocabulary ? [encoder.unknown_from, encoder.unknown] : [1, encoder.buckets];
  const hash = (data) => (encoder.salt == null ? fingerprint64(data) : siphash(data, encoder.salt));
  const hashRow = (text) => start + (count === 1 ? 0 : Number(hash(asBytes(text)) % BigInt(count)));
  return (text) => rows.get(text) ?? hashRow(text);
}

function rowEncoder(encoder) {
  if (encoder.type === "bucket") {
    const boundaries = encoder.boundaries.map(float);
    return (value) => [Number.isNaN(value) ? 0 : boundaries.filter((boundary) => boundary <= value).length + 1];
  }
  const lookUp = rowLookup(encoder);
  return (text) => (encoder.length ? splitWords(text, encoder.length) : [text]).map(lookUp);
}

function numberColumn(column, value) {
  const missing = Number.isNaN(value);
  if (column.part === "missing") return [missing ? 1 : 0];
  if (missing) return [column.fill];
  if (column.log) value = float(Math.sign(value) * float(Math.log1p(Math.abs(value))));
  return [float(float(value - float(column.shift)) * float(column.scale))];
}

function momentColumn(column, field) {
  if (column.part === "missing") return [1 - field.known];
  if (column.part === "days") {
    const shifted = float(float(field.days - float(column.whole)) + float(field.time - float(column.rest)));
    return [float(shifted * float(column.scale)) * field.known];
  }
  const index = field[column.part] - column.first;
  if (column.cyclic) {
    const angle = float(index * float((2 * Math.PI) / column.count));
    return [Math.sin(angle) * field.known, Math.cos(angle) * field.known];
  }
  return Array.from({ length: column.count }, (_, position) => (position === index ? field.known : 0));
}

// ---- validation of raw values

function readValue(feature, value) {
  const fail = () => {
    throw new Error(`Feature '${feature.name}' takes values of type ${feature.dtype}, not ${JSON.stringify(value)}.`);
  };
  if (feature.dtype === "string") return value == null ? "" : typeof value === "string" ? value : fail();
  if (!feature.shape.length) {
    if (value == null) return NaN;
    return typeof value === "number" || typeof value === "boolean" ? float(Number(value)) : fail();
  }
  const flat = ArrayBuffer.isView(value) ? Array.from(value) : Array.isArray(value) ? value.flat(Infinity) : fail();
  const size = feature.shape.reduce((left, right) => left * right, 1);
  if (flat.length !== size) throw new Error(`Feature '${feature.name}' takes ${size} values, not ${flat.length}.`);
  return flat.map((item) => (typeof item === "number" ? item : fail()));
}

// ---- the preprocessor

export class Preprocessor {
  constructor(record) {
    this.record = record;
    const encoders = Object.entries(record.rows).filter(([, encoder]) => encoder.type !== "cross");
    this.encoders = Object.fromEntries(encoders.map(([name, encoder]) => [name, rowEncoder(encoder)]));
    this.features = Object.fromEntries(record.features.map((feature) => [feature.name, feature]));
  }

  // From one row, {feature: value or null}, to typed arrays by the names of the network's inputs.
  encode(row) {
    const expected = `The model takes: ${Object.keys(this.features).join(", ")}.`;
    for (const name of Object.keys(row)) {
      if (!(name in this.features)) throw new Error(`Unknown feature '${name}'. ${expected}`);
    }
    const values = {};
    for (const [name, feature] of Object.entries(this.features)) {
      if (!(name in row)) throw new Error(`Feature '${name}' is missing. ${expected}`);
      values[name] = readValue(feature, row[name]);
    }
    return Object.fromEntries(
      this.record.inputs.map((input) => {
        const data = this.encodeInput(input, values);
        const typed = input.dtype === "float32" ? Float32Array.from(data) : Int32Array.from(data);
        return [input.name, { data: typed, shape: [1, ...input.shape] }];
      }),
    );
  }

  encodeInput(input, values) {
    if ("feature" in input) return [values[input.feature]].flat();
    if ("columns" in input) return input.columns.flatMap((column) => this.encodeColumn(column, values));
    return this.encodeRows(input.rows, values);
  }

  encodeRows(name, values) {
    const encoder = this.record.rows[name];
    if (encoder.type !== "cross") return this.encoders[name](values[encoder.feature]);
    return [crossRows(encoder.columns.flatMap((column) => this.encodeRows(column, values)), encoder.buckets)];
  }

  encodeColumn(column, values) {
    const value = values[column.feature];
    const moment = this.features[column.feature].type === "datetime";
    return moment ? momentColumn(column, momentFields(value)) : numberColumn(column, value);
  }

  // From the network's outputs, one array for each label, to named outputs of the row.
  nameOutputs(outputs) {
    const { task, tasks, label, classes } = this.record;
    if (task !== "multi") return nameLabelOutputs(outputs[0], task, classes);
    const byLabel = label.map((name, index) => [name, nameLabelOutputs(outputs[index], tasks[name], classes[name] ?? [])]);
    return Object.fromEntries(
      byLabel.flatMap(([name, named]) => Object.entries(named).map(([key, value]) => [`${name}_${key}`, value])),
    );
  }
}

export function nameLabelOutputs(output, task, classes) {
  if (task === "regression") return { prediction: output[0] };
  let probabilities = Array.from(output);
  if (task === "binary" && probabilities.length !== 2) probabilities = [float(1 - output[0]), output[0]];
  const order = probabilities.map((_, index) => index).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
  const named = { probabilities, class: classes[order[0]], score: probabilities[order[0]] };
  if (classes.length <= 50) return named; // mlkit.metrics.MANY_CLASSES
  const best = order.slice(0, 10);
  return { ...named, top_classes: best.map((row) => classes[row]), top_scores: best.map((row) => probabilities[row]) };
}
