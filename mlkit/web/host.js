// What mlkit.host does in Python: from raw values to the numbers a converted network takes, and from its numbers to
// named answers. A test holds the two to the same results.

const ALL = (1n << 64n) - 1n;
const [K0, K1, K2] = [0xc3a5c85c97cb3127n, 0xb492b66fbe98f273n, 0x9ae16a3b2f90404fn];
const float = Math.fround;
const asBytes = (text) => new TextEncoder().encode(text);

// ---- FarmHash's Fingerprint64, SipHash-2-4, and crosses

const rotated = (value, bits) => {
  value &= ALL;
  return (value >> bits) | ((value << (64n - bits)) & ALL);
};
const folded = (value) => {
  value &= ALL;
  return value ^ (value >> 47n);
};
const word = (data, start, size = 8) => {
  if (start < 0) start += data.length;
  let value = 0n;
  for (let place = Math.min(size, data.length - start) - 1; place >= 0; place--) {
    value = (value << 8n) | BigInt(data[start + place]);
  }
  return value;
};
const two = (first, second, factor) => {
  const once = folded((first ^ second) * factor);
  return (folded((second ^ once) * factor) * factor) & ALL;
};

function shortPrint(data) {
  const size = BigInt(data.length);
  const factor = K2 + 2n * size;
  if (size >= 8n) {
    const first = (word(data, 0) + K2) & ALL;
    const last = word(data, -8);
    return two((rotated(last, 37n) * factor + first) & ALL, ((rotated(first, 25n) + last) * factor) & ALL, factor);
  }
  if (size >= 4n) return two(size + (word(data, 0, 4) << 3n), word(data, -4, 4), factor);
  if (size === 0n) return K2;
  const head = BigInt(data[0]) + (BigInt(data[data.length >> 1]) << 8n);
  const tail = size + (BigInt(data[data.length - 1]) << 2n);
  return (folded((head * K2) ^ (tail * K0)) * K2) & ALL;
}

function middlePrint(data) {
  const size = BigInt(data.length);
  const factor = K2 + 2n * size;
  const first = (word(data, 0) * (size <= 32n ? K1 : K2)) & ALL;
  const [second, last, before] = [word(data, 8), word(data, -8) * factor, word(data, -16) * K2];
  const sum = (rotated(first + second, 43n) + rotated(last, 30n) + before) & ALL;
  const other = (first + rotated(second + K2, 18n) + last) & ALL;
  if (size <= 32n) return two(sum, other, factor);
  const inner = two(sum, other, factor);
  const [third, fourth] = [(word(data, 16) * factor) & ALL, word(data, 24)];
  const [fifth, sixth] = [(sum + word(data, -32)) * factor, (inner + word(data, -24)) * factor];
  const left = (rotated(third + fourth, 43n) + rotated(fifth, 30n) + sixth) & ALL;
  return two(left, (third + rotated(fourth + first, 18n) + fifth) & ALL, factor);
}

function stirred(data, start, first, second) {
  const [one, two_, three, four] = [0, 8, 16, 24].map((place) => word(data, start + place));
  first += one;
  second = rotated(second + first + four, 21n);
  const kept = first;
  first += two_ + three;
  return [(first + four) & ALL, (second + rotated(first, 44n) + kept) & ALL];
}

function longPrint(data) {
  const size = data.length;
  let x = (81n * K2 + word(data, 0)) & ALL;
  let y = (81n * K1 + 113n) & ALL;
  let z = (folded(y * K2 + 113n) * K2) & ALL;
  let [v, w] = [[0n, 0n], [0n, 0n]];
  const round = (start, factor, last) => {
    x = (rotated(x + y + v[0] + word(data, start + 8), 37n) * factor) & ALL;
    y = (rotated(y + v[1] + word(data, start + 48), 42n) * factor) & ALL;
    x ^= (last ? w[1] * 9n : w[1]) & ALL;
    y = (y + (last ? v[0] * 9n : v[0]) + word(data, start + 40)) & ALL;
    z = (rotated(z + w[0], 33n) * factor) & ALL;
    v = stirred(data, start, v[1] * factor, x + w[0]);
    w = stirred(data, start + 32, z + w[1], y + word(data, start + 16));
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
  const left = (two(v[0], w[0], factor) + folded(y) * K0 + z) & ALL;
  return two(left, (two(v[1], w[1], factor) + x) & ALL, factor);
}

export function fingerprint64(data) {
  return data.length <= 16 ? shortPrint(data) : data.length <= 64 ? middlePrint(data) : longPrint(data);
}

function siphashRounds([a, b, c, d], count) {
  for (; count; count--) {
    [a, c] = [(a + b) & ALL, (c + d) & ALL];
    [b, d] = [rotated(b, 51n) ^ a, rotated(d, 48n) ^ c];
    a = rotated(a, 32n);
    [a, c] = [(a + d) & ALL, (c + b) & ALL];
    [d, b] = [rotated(d, 43n) ^ a, rotated(b, 47n) ^ c];
    c = rotated(c, 32n);
  }
  return [a, b, c, d];
}

export function siphash(data, salt) {
  const key = BigInt(salt) & ALL;
  const starts = [0x736f6d6570736575n, 0x646f72616e646f6dn, 0x6c7967656e657261n, 0x7465646279746573n];
  let state = starts.map((start) => key ^ start);
  const padded = new Uint8Array(Math.ceil((data.length + 1) / 8) * 8);
  padded.set(data);
  padded[padded.length - 1] = data.length % 256;
  for (let start = 0; start < padded.length; start += 8) {
    const block = word(padded, start);
    state[3] ^= block;
    state = siphashRounds(state, 2);
    state[0] ^= block;
  }
  state[2] ^= 0xffn;
  return siphashRounds(state, 4).reduce((left, right) => left ^ right);
}

function crossTwo(first, second, bins) {
  const factor = 0xc6a4a7935bd1e995n;
  let mixed = 0xdecafcaffen;
  for (const row of [first, second]) {
    mixed ^= factor ^ ((folded(row * factor) * factor) & ALL);
    mixed = folded(folded(mixed * factor) * factor);
  }
  return mixed % bins;
}

export function crossRows(rows, buckets) {
  const numbers = rows.map(BigInt);
  const last = numbers.pop();
  const first = numbers.reduce((left, right) => crossTwo(left, right, 2147483647n));
  return Number(crossTwo(first, last, BigInt(buckets)));
}

// ---- words and moments

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
  const nothing = { known: 0, days: 0, time: 0, month: 0, day: 0, weekday: 0, hour: 0, minute: 0 };
  const found = MOMENT.exec(text);
  if (!found) return nothing;
  const [year, month, day, hour, minute] = found.slice(1, 6).map((part) => Number(part ?? 0));
  const zone = Number(found[8] ?? 0) * 60 + Number(found[9] ?? 0);
  const begin = new Date(0);
  begin.setUTCFullYear(year, month - 1, day);
  const exists = begin.getUTCFullYear() === year && begin.getUTCMonth() === month - 1 && begin.getUTCDate() === day;
  const asked = hour * 60 + minute + (found[7] === "-" ? zone : -zone);
  const days = begin.getTime() / DAY + Math.floor(asked / 1440);
  const moved = new Date(days * DAY);
  if (!exists || year < 1 || moved.getUTCFullYear() < 1 || moved.getUTCFullYear() > 9999) return nothing;
  const minutes = ((asked % 1440) + 1440) % 1440;
  return {
    known: 1,
    days,
    time: float(float(minutes * 60 + float(Number(found[6] ?? 0))) * float(1 / 86_400)),
    month: moved.getUTCMonth() + 1,
    day: moved.getUTCDate(),
    weekday: (((days + 3) % 7) + 7) % 7,
    hour: Math.floor(minutes / 60),
    minute: minutes % 60,
  };
}

// ---- rows and columns

function rowFinder(encoder) {
  const rows = new Map((encoder.vocabulary ?? []).map((text, place) => [text, place + encoder.first]));
  if (encoder.empty !== null) rows.set("", encoder.empty);
  const [start, count] = encoder.vocabulary ? [encoder.unknown_from, encoder.unknown] : [1, encoder.buckets];
  const hash = (data) => (encoder.salt == null ? fingerprint64(data) : siphash(data, encoder.salt));
  const hashed = (text) => start + (count === 1 ? 0 : Number(hash(asBytes(text)) % BigInt(count)));
  return (text) => rows.get(text) ?? hashed(text);
}

function rowEncoder(encoder) {
  if (encoder.kind === "bucket") {
    const boundaries = encoder.boundaries.map(float);
    return (value) => [Number.isNaN(value) ? 0 : boundaries.filter((boundary) => boundary <= value).length + 1];
  }
  const find = rowFinder(encoder);
  return (text) => (encoder.length ? splitWords(text, encoder.length) : [text]).map(find);
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
    const apart = float(float(field.days - float(column.whole)) + float(field.time - float(column.rest)));
    return [float(apart * float(column.scale)) * field.known];
  }
  const place = field[column.part] - column.first;
  if (column.cyclic) {
    const angle = float(place * float((2 * Math.PI) / column.count));
    return [Math.sin(angle) * field.known, Math.cos(angle) * field.known];
  }
  return Array.from({ length: column.count }, (_, at) => (at === place ? field.known : 0));
}

// ---- values at the door

function readValue(feature, value) {
  const refuse = () => {
    throw new Error(`Feature '${feature.name}' takes values of type ${feature.dtype}, not ${JSON.stringify(value)}.`);
  };
  if (feature.dtype === "string") return value == null ? "" : typeof value === "string" ? value : refuse();
  if (!feature.shape.length) {
    if (value == null) return NaN;
    return typeof value === "number" || typeof value === "boolean" ? float(Number(value)) : refuse();
  }
  const flat = ArrayBuffer.isView(value) ? Array.from(value) : Array.isArray(value) ? value.flat(Infinity) : refuse();
  const size = feature.shape.reduce((left, right) => left * right, 1);
  if (flat.length !== size) throw new Error(`Feature '${feature.name}' takes ${size} values, not ${flat.length}.`);
  return flat.map((each) => (typeof each === "number" ? each : refuse()));
}

// ---- the whole first part

export class Host {
  constructor(record) {
    this.record = record;
    const encoders = Object.entries(record.rows).filter(([, encoder]) => encoder.kind !== "cross");
    this.find = Object.fromEntries(encoders.map(([name, encoder]) => [name, rowEncoder(encoder)]));
    this.features = Object.fromEntries(record.features.map((feature) => [feature.name, feature]));
  }

  // From one row, {feature: value or null}, to typed arrays by the names of the network's inputs.
  encode(row) {
    const takes = `The model takes: ${Object.keys(this.features).join(", ")}.`;
    for (const name of Object.keys(row)) {
      if (!(name in this.features)) throw new Error(`Unknown feature '${name}'. ${takes}`);
    }
    const values = {};
    for (const [name, feature] of Object.entries(this.features)) {
      if (!(name in row)) throw new Error(`Feature '${name}' is missing. ${takes}`);
      values[name] = readValue(feature, row[name]);
    }
    return Object.fromEntries(
      this.record.inputs.map((input) => {
        const data = this.input(input, values);
        const typed = input.dtype === "float32" ? Float32Array.from(data) : Int32Array.from(data);
        return [input.name, { data: typed, shape: [1, ...input.shape] }];
      }),
    );
  }

  input(input, values) {
    if ("feature" in input) return [values[input.feature]].flat();
    if ("columns" in input) return input.columns.flatMap((column) => this.column(column, values));
    return this.rows(input.rows, values);
  }

  rows(name, values) {
    const encoder = this.record.rows[name];
    if (encoder.kind !== "cross") return this.find[name](values[encoder.feature]);
    return [crossRows(encoder.columns.flatMap((column) => this.rows(column, values)), encoder.buckets)];
  }

  column(column, values) {
    const value = values[column.feature];
    const moment = this.features[column.feature].kind === "datetime";
    return moment ? momentColumn(column, momentFields(value)) : numberColumn(column, value);
  }

  // From the network's outputs, one array for each label, to named answers of the row.
  answers(outputs) {
    const { task, tasks, label, classes } = this.record;
    if (task !== "multi") return nameAnswers(outputs[0], task, classes);
    const each = label.map((name, place) => [name, nameAnswers(outputs[place], tasks[name], classes[name] ?? [])]);
    return Object.fromEntries(
      each.flatMap(([name, found]) => Object.entries(found).map(([key, value]) => [`${name}_${key}`, value])),
    );
  }
}

export function nameAnswers(output, task, classes) {
  if (task === "regression") return { prediction: output[0] };
  let probabilities = Array.from(output);
  if (task === "binary" && probabilities.length !== 2) probabilities = [float(1 - output[0]), output[0]];
  const order = probabilities.map((_, place) => place).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
  const answers = { probabilities, class: classes[order[0]], score: probabilities[order[0]] };
  if (classes.length <= 50) return answers;
  const best = order.slice(0, 10);
  return { ...answers, top_classes: best.map((at) => classes[at]), top_scores: best.map((at) => probabilities[at]) };
}
