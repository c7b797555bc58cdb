// A client of Janus Backup on @grpc/grpc-js with its default settings. It has no .proto file of the project: it asks
// the other end by reflection (v1) and makes its stubs from the answer.
//
//   janus_client.mjs --url URL --cert PEM --key PEM --ca PEM [--pins yes|no] backup DISK_ID FILE
//   janus_client.mjs ... list | services | restore SNAPSHOT_ID FILE
//   janus_client.mjs ... check [SERVICE]          one health check
//   janus_client.mjs ... watch [SERVICE]          one line of JSON for each change, until it is killed
//   janus_client.mjs --plain HOST:PORT check [SERVICE]
//
// Prints one JSON object. A whole disk is held in memory; each backup is compared with the server's hashes.

import { createRequire } from "node:module";
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { randomUUID } from "node:crypto";
import { parseArgs } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { blake3 } from "@noble/hashes/blake3.js";

const BLOCK = 4096;
const SEGMENT_BLOCKS = 1024;
const BATCH_BLOCKS = 256;
const OPTIONS = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };

const require = createRequire(import.meta.url);
const packageFolder = (name) => dirname(require.resolve(`${name}/package.json`));

const { values: args, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    url: { type: "string" },
    cert: { type: "string" },
    key: { type: "string" },
    ca: { type: "string" },
    plain: { type: "string" },
    pins: { type: "string", default: "yes" },
  },
});

const target = args.plain ?? args.url.replace("https://", "");
// Nothing is tuned: the contract promises that default limits and windows do.
const credentials = args.plain
  ? grpc.credentials.createInsecure()
  : grpc.credentials.createSsl(readFileSync(args.ca), readFileSync(args.key), readFileSync(args.cert));

const deadline = (seconds) => ({ deadline: Date.now() + seconds * 1000 });

/** A unary call: its answer and the initial metadata. */
function call(client, method, request, metadata = new grpc.Metadata(), seconds = 60) {
  return new Promise((resolve, reject) => {
    let headers;
    const running = client[method](request, metadata, deadline(seconds), (error, answer) =>
      error ? reject(error) : resolve({ answer, headers }),
    );
    running.on("metadata", (received) => (headers = received));
  });
}

/** Everything that a server stream answers. */
async function collect(stream, take) {
  for await (const answer of stream) take(answer);
}

// ---- reflection ----------------------------------------------------------------------------------------------------

function reflectionClient() {
  const file = join(packageFolder("@grpc/reflection"), "build/proto/grpc/reflection/v1/reflection.proto");
  const { grpc: root } = grpc.loadPackageDefinition(loader.loadSync(file, OPTIONS));
  return new root.reflection.v1.ServerReflection(target, credentials);
}

/** Answers to the questions, in their order. */
async function reflect(questions) {
  const client = reflectionClient();
  const stream = client.ServerReflectionInfo(deadline(30));
  const answers = [];
  const done = collect(stream, (answer) => answers.push(answer));
  for (const question of questions) stream.write({ host: "", ...question });
  stream.end();
  await done;
  client.close();
  return answers;
}

async function services() {
  const [answer] = await reflect([{ list_services: "" }]);
  return { services: answer.list_services_response.service.map((service) => service.name).sort() };
}

/** The stubs of the package, from the descriptors that reflection gives. */
async function contract() {
  const names = ["Backup", "Restore", "Catalog"].map((name) => `janus.v1.${name}Service`);
  const answers = await reflect(names.map((name) => ({ file_containing_symbol: name })));
  const files = new Map();
  const pending = answers.flatMap((answer) => answer.file_descriptor_response.file_descriptor_proto);
  for (const file of pending) files.set(Buffer.from(file).toString("base64"), Buffer.from(file));
  // The other end may send a file without those it imports: ask for these by name.
  for (const name of ["janus/v1/types.proto"]) {
    const [answer] = await reflect([{ file_by_filename: name }]);
    for (const file of answer.file_descriptor_response.file_descriptor_proto)
      files.set(Buffer.from(file).toString("base64"), Buffer.from(file));
  }
  // A FileDescriptorSet is its files, each as field 1.
  const parts = [...files.values()].flatMap((file) => [varint(0x0a), varint(file.length), file]);
  const loaded = loader.loadFileDescriptorSetFromBuffer(Buffer.concat(parts), OPTIONS);
  const { janus } = grpc.loadPackageDefinition(loaded);
  const stub = (name) => new janus.v1[name](target, credentials);
  return { backup: stub("BackupService"), restore: stub("RestoreService"), catalog: stub("CatalogService") };
}

function varint(number) {
  const bytes = [];
  for (; number > 127; number >>>= 7) bytes.push((number & 127) | 128);
  return Buffer.from([...bytes, number]);
}

// ---- health --------------------------------------------------------------------------------------------------------

function healthClient() {
  const file = join(packageFolder("grpc-health-check"), "proto/health/v1/health.proto");
  const { grpc: root } = grpc.loadPackageDefinition(loader.loadSync(file, OPTIONS));
  return new root.health.v1.Health(target, credentials);
}

async function check(service = "") {
  const { answer } = await call(healthClient(), "Check", { service }, undefined, 10);
  return { status: answer.status };
}

async function watch(service = "") {
  await collect(healthClient().Watch({ service }), ({ status }) => console.log(JSON.stringify({ status })));
  return { ended: true };
}

// ---- hashes --------------------------------------------------------------------------------------------------------

const blocksOf = (data) =>
  Array.from({ length: Math.ceil(data.length / BLOCK) }, (_, n) => data.subarray(n * BLOCK, (n + 1) * BLOCK));

function tableDigest(size, hashes) {
  const table = blake3.create();
  const head = Buffer.alloc(12);
  head.writeBigUInt64LE(BigInt(size), 0);
  head.writeUInt32LE(BLOCK, 8);
  table.update(head);
  for (let at = 0; at < hashes.length; at += SEGMENT_BLOCKS)
    table.update(blake3(Buffer.concat(hashes.slice(at, at + SEGMENT_BLOCKS))));
  return Buffer.from(table.digest());
}

// ---- calls ---------------------------------------------------------------------------------------------------------

/** Metadata that names the server and the run, or, without pins, nothing. */
function pin(server, run) {
  const metadata = new grpc.Metadata();
  if (args.pins === "yes") {
    metadata.set("janus-server", server);
    if (run) metadata.set("janus-run", run);
  }
  return metadata;
}

async function list() {
  const { catalog } = await contract();
  const [snapshots, unreachable] = [[], []];
  for (let token = ""; ; ) {
    const { answer } = await call(catalog, "ListSnapshots", { page_size: 2, page_token: token });
    for (const s of answer.snapshots)
      snapshots.push({ snapshot_id: s.snapshot_id, server: s.server_id, disk_id: s.disk_id, size_bytes: s.size_bytes });
    unreachable.push(...answer.unreachable.map((server) => server.server_id));
    token = answer.next_page_token;
    if (!token) return { snapshots, unreachable };
  }
}

/** Messages for the changed blocks: extents of neighbours, zero runs without data. */
function* batches(changed, blocks, hashes) {
  let batch = null;
  const begin = () => ({ extents: [], hashes: [], data: [], encoding: "ENCODING_NONE" });
  const whole = (b) => ({ ...b, hashes: Buffer.concat(b.hashes), data: Buffer.concat(b.data) });
  for (const number of changed) {
    batch ??= begin();
    const zero = blocks[number].every((byte) => byte === 0);
    const last = batch.extents.at(-1);
    if (last && last.zero === zero && last.first_block + last.block_count === number) last.block_count += 1;
    else batch.extents.push({ first_block: number, block_count: 1, zero });
    if (!zero) {
      batch.hashes.push(hashes[number]);
      batch.data.push(blocks[number]);
    }
    if (batch.data.length === BATCH_BLOCKS || batch.extents.length === 4000) {
      yield whole(batch);
      batch = null;
    }
  }
  if (batch) yield whole(batch);
}

async function write(backup, start, session, changed, blocks, hashes, metadata) {
  const stream = backup.WriteBlocks(metadata, deadline(300));
  let acknowledged = 0;
  const done = collect(stream, (answer) => (acknowledged = answer.received_messages));
  const head = { session_id: session.session_id, epoch: start.epoch };
  let sent = 0;
  const send = async (message) => {
    sent += 1;
    if (!stream.write({ ...head, ...message })) await new Promise((resolve) => stream.once("drain", resolve));
  };
  const sending = (async () => {
    await send({});
    for (const batch of batches(changed, blocks, hashes)) await send({ batch });
    await send({ settled_block: blocks.length });
    stream.end();
  })();
  await Promise.race([Promise.all([sending, done]), done.then(() => sending)]);
  if (acknowledged !== sent) throw new Error(`sent ${sent} messages, ${acknowledged} acknowledged`);
  return sent;
}

async function backup(diskId, path) {
  const stubs = await contract();
  const data = readFileSync(path);
  const blocks = blocksOf(data);
  const hashes = blocks.map((block) => Buffer.from(blake3(block)));
  const { answer: start, headers } = await call(stubs.backup, "StartBackup", {
    backup_id: randomUUID(),
    disks: [{ disk_id: diskId, size_bytes: data.length }],
    encodings: ["ENCODING_NONE"],
  });
  const metadata = pin(start.server_id, start.backup_id);
  const [session] = start.sessions;
  let old = blocks.map((block) => Buffer.from(blake3(new Uint8Array(block.length))));
  if (session.head) {
    old = [];
    const request = { session_id: session.session_id, level: "HASH_LEVEL_BLOCK" };
    await collect(stubs.restore.ReadHashes(request, metadata, deadline(60)), ({ batch }) => {
      if (batch.first !== old.length) throw new Error("hashes are not in order");
      for (let at = 0; at < batch.hashes.length; at += 32) old.push(batch.hashes.subarray(at, at + 32));
    });
  }
  const changed = [...hashes.keys()].filter((number) => !hashes[number].equals(old[number]));
  const sent = await write(stubs.backup, start, session, changed, blocks, hashes, metadata);
  const digest = tableDigest(data.length, hashes);
  const { answer: commit } = await call(
    stubs.backup,
    "CommitBackup",
    {
      backup_id: start.backup_id,
      epoch: start.epoch,
      disks: [
        {
          disk_id: diskId,
          expected_head_id: session.head?.snapshot_id ?? "",
          table_digest: digest,
          consistency: "CONSISTENCY_FROZEN",
        },
      ],
    },
    metadata,
    300,
  );
  return {
    server: start.server_id,
    server_in_metadata: headers.get("janus-server")[0],
    use_counter: start.use_counter,
    snapshot_id: commit.snapshots[0].snapshot_id,
    table_digest: commit.snapshots[0].table_digest.toString("hex"),
    delta: session.head !== null,
    changed_blocks: changed.length,
    sent_messages: sent,
  };
}

async function restore(snapshotId, path) {
  const stubs = await contract();
  const { answer: found } = await call(stubs.catalog, "GetSnapshot", { snapshot_id: snapshotId });
  const metadata = pin(found.snapshot.server_id);
  const { answer: opened } = await call(stubs.restore, "OpenSnapshot", { snapshot_id: snapshotId }, metadata);
  const data = Buffer.alloc(opened.snapshot.size_bytes);
  const request = { handle: opened.handle, encodings: ["ENCODING_NONE"] };
  await collect(stubs.restore.ReadBlocks(request, metadata, deadline(300)), ({ batch }) => {
    let [at, number] = [0, 0];
    for (const extent of batch.extents) {
      for (let n = extent.first_block; !extent.zero && n < extent.first_block + extent.block_count; n += 1) {
        const content = batch.data.subarray(at, at + Math.min(BLOCK, data.length - n * BLOCK));
        const recorded = batch.hashes.subarray(number * 32, number * 32 + 32);
        if (!recorded.equals(Buffer.from(blake3(content)))) throw new Error(`block ${n} has another hash`);
        content.copy(data, n * BLOCK);
        [at, number] = [at + content.length, number + 1];
      }
    }
  });
  await call(stubs.restore, "CloseSnapshot", { handle: opened.handle }, metadata);
  const hashes = blocksOf(data).map((block) => Buffer.from(blake3(block)));
  if (!tableDigest(data.length, hashes).equals(opened.snapshot.table_digest))
    throw new Error("the restored disk is another");
  writeFileSync(path, data);
  return { server: opened.snapshot.server_id, size_bytes: data.length };
}

/** Test vectors of the project. */
function vectors(path) {
  const { disks } = JSON.parse(readFileSync(path, "utf8"));
  for (const disk of disks) {
    const size = disk.size_bytes;
    const data = Buffer.alloc(size);
    if (disk.content !== "zeros")
      for (let i = 0; i < size; i += 1) data[i] = (i % 251) ^ (Math.floor(i / BLOCK) % 256);
    const digest = tableDigest(size, blocksOf(data).map((block) => Buffer.from(blake3(block))));
    if (digest.toString("hex") !== disk.table_digest) throw new Error(`disk of ${size} bytes: another digest`);
  }
  return { checked: disks.length };
}

const commands = { backup, check, list, restore, services, vectors, watch };

try {
  const [command, ...rest] = positionals;
  console.log(JSON.stringify({ ok: true, ...(await commands[command](...rest)) }));
  process.exit(0);
} catch (error) {
  // grpc-js gives the details as bytes; the reason is plain text in them.
  const details = error.metadata?.get("grpc-status-details-bin")?.[0]?.toString("latin1") ?? "";
  const reason = /ERROR_REASON_[A-Z_]+/.exec(details)?.[0] ?? null;
  const code = Object.keys(grpc.status).find((name) => grpc.status[name] === error.code) ?? null;
  console.log(JSON.stringify({ ok: false, code, reason, error: error.details ?? String(error.stack ?? error) }));
  process.exit(1);
}
