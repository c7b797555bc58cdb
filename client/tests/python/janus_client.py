"""A client of Janus Backup written from the .proto files and proto/vectors.json alone.

    janus_client.py --url URL --cert PEM --key PEM --ca PEM [--stubs DIR] [--pins yes|no] backup DISK_ID FILE
    janus_client.py ... list | services | restore SNAPSHOT_ID FILE
    janus_client.py ... check [SERVICE]          one health check
    janus_client.py ... watch [SERVICE]          one line of JSON for each change, until it is killed
    janus_client.py --plain HOST:PORT check [SERVICE]

Prints one JSON object. It keeps nothing between runs: each backup compares the whole disk with the hashes of the
server's head. Small disks only, since a whole disk is held in memory.
"""

import argparse
import json
import os
import queue
import sys
import uuid

import grpc
from blake3 import blake3
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

BLOCK = 4096
SEGMENT_BLOCKS = 1024
BATCH_BLOCKS = 256
ZERO = bytes(BLOCK)


def stubs(folder):
    """The modules that grpcio-tools makes of the schema, by name."""
    sys.path.insert(0, folder)
    names = ["types", "backup", "restore", "catalog"]
    modules = {}
    for name in names:
        modules[name] = __import__(f"janus.v1.{name}_pb2", fromlist=["*"])
        modules[name + "_grpc"] = __import__(f"janus.v1.{name}_pb2_grpc", fromlist=["*"])
    return modules


def blocks(data):
    return [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]


def is_zero(block):
    return block == ZERO[: len(block)]


def block_hash(block):
    return blake3(block).digest()


def table_digest(size, hashes):
    table = blake3(size.to_bytes(8, "little") + BLOCK.to_bytes(4, "little"))
    for at in range(0, len(hashes), SEGMENT_BLOCKS):
        table.update(blake3(b"".join(hashes[at : at + SEGMENT_BLOCKS])).digest())
    return table.digest()


def check_vectors(path):
    """Compares this file's hashing with the project's vectors."""
    with open(path, encoding="utf-8") as file:
        vectors = json.load(file)
    for disk in vectors["disks"]:
        size = disk["size_bytes"]
        if disk["content"] == "zeros":
            data = bytes(size)
        else:
            data = bytes((i % 251) ^ (i // BLOCK % 256) for i in range(size))
        hashes = [block_hash(block) for block in blocks(data)]
        assert len(hashes) == disk["blocks"], disk
        assert table_digest(size, hashes).hex() == disk["table_digest"], disk
    return len(vectors["disks"])


def batches(pb, changed, new_blocks, hashes):
    """Messages for the blocks numbered in `changed`: extents of neighbours, zero runs without data."""
    batch, carried, last = None, 0, None
    for number in changed:
        block = new_blocks[number]
        zero = is_zero(block)
        if batch is None:
            batch, carried, last = pb.BlockBatch(encoding=pb.ENCODING_NONE), 0, None
        if last is not None and last.zero == zero and last.first_block + last.block_count == number:
            last.block_count += 1
        else:
            last = batch.extents.add(first_block=number, block_count=1, zero=zero)
        if not zero:
            batch.hashes += hashes[number]
            batch.data += block
            carried += 1
        if carried == BATCH_BLOCKS or len(batch.extents) == 4000:
            yield batch
            batch = None
    if batch is not None:
        yield batch


class Client:
    def __init__(self, args):
        self.pb = stubs(args.stubs)
        self.pins = args.pins == "yes"
        # Nothing is tuned: the contract promises that default limits and windows do.
        if args.plain:
            self.channel = grpc.insecure_channel(args.plain)
        else:
            read = lambda path: open(path, "rb").read()
            credentials = grpc.ssl_channel_credentials(read(args.ca), read(args.key), read(args.cert))
            self.channel = grpc.secure_channel(args.url.removeprefix("https://"), credentials)
        self.backup_service = self.pb["backup_grpc"].BackupServiceStub(self.channel)
        self.restore_service = self.pb["restore_grpc"].RestoreServiceStub(self.channel)
        self.catalog_service = self.pb["catalog_grpc"].CatalogServiceStub(self.channel)

    def pin(self, server, run=None):
        """Metadata that names the server and the run, or, without pins, nothing."""
        named = [("janus-server", server)] + ([("janus-run", run)] if run else [])
        return tuple(named) if self.pins else ()

    def check(self, service=""):
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=10)
        return {"status": health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}

    def watch(self, service=""):
        request = health_pb2.HealthCheckRequest(service=service)
        for answer in health_pb2_grpc.HealthStub(self.channel).Watch(request):
            status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            print(json.dumps({"status": status}), flush=True)
        return {"ended": True}

    def services(self):
        """Names by reflection; the contract's services are looked up as a user would, with all that they import."""
        database = ProtoReflectionDescriptorDatabase(self.channel)
        names = sorted(database.get_services())
        pool = DescriptorPool(database)
        for name in [name for name in names if name.startswith("janus.v1.")]:
            service = pool.FindServiceByName(name)
            assert service.methods, name
            assert all(method.input_type.full_name.startswith("janus.v1.") for method in service.methods), name
        return {"services": names}

    def list(self):
        found, token = [], ""
        while True:
            request = self.pb["catalog"].ListSnapshotsRequest(page_size=2, page_token=token)
            page = self.catalog_service.ListSnapshots(request, timeout=30)
            for s in page.snapshots:
                found.append(
                    {
                        "snapshot_id": s.snapshot_id,
                        "server": s.server_id,
                        "machine": s.machine,
                        "disk_id": s.disk_id,
                        "size_bytes": s.size_bytes,
                        "table_digest": s.table_digest.hex(),
                        "parent_snapshot_id": s.parent_snapshot_id,
                    }
                )
            token = page.next_page_token
            if not token:
                return {"snapshots": found, "unreachable": [u.server_id for u in page.unreachable]}

    def head_hashes(self, session, pin, count):
        """Hashes of what the session starts from, read from the server."""
        request = self.pb["restore"].ReadHashesRequest(
            session_id=session.session_id, level=self.pb["restore"].HASH_LEVEL_BLOCK
        )
        hashes = []
        for answer in self.restore_service.ReadHashes(request, metadata=pin, timeout=60):
            assert answer.batch.first == len(hashes), "hashes are not in order"
            piece = answer.batch.hashes
            hashes += [piece[at : at + 32] for at in range(0, len(piece), 32)]
        assert len(hashes) == count, (len(hashes), count)
        return hashes

    def backup(self, disk_id, path):
        with open(path, "rb") as file:
            data = file.read()
        new_blocks = blocks(data)
        hashes = [block_hash(block) for block in new_blocks]
        pb, types = self.pb["backup"], self.pb["types"]
        start, call = self.backup_service.StartBackup.with_call(
            pb.StartBackupRequest(
                backup_id=str(uuid.uuid4()),
                disks=[pb.DiskStart(disk_id=disk_id, size_bytes=len(data))],
                encodings=[types.ENCODING_NONE],
            ),
            timeout=30,
        )
        answered = dict(call.initial_metadata())
        pin = self.pin(start.server_id, start.backup_id)
        session = start.sessions[0]
        if session.HasField("head"):
            old = self.head_hashes(session, pin, len(hashes))
        else:
            old = [block_hash(bytes(len(block))) for block in new_blocks]
        changed = [number for number in range(len(hashes)) if hashes[number] != old[number]]
        sent = self.write(start, session, changed, new_blocks, hashes, pin)
        commit = self.backup_service.CommitBackup(
            pb.CommitBackupRequest(
                backup_id=start.backup_id,
                epoch=start.epoch,
                disks=[
                    pb.DiskCommit(
                        disk_id=disk_id,
                        expected_head_id=session.head.snapshot_id if session.HasField("head") else "",
                        table_digest=table_digest(len(data), hashes),
                        consistency=types.CONSISTENCY_FROZEN,
                    )
                ],
            ),
            metadata=pin,
            timeout=300,
        )
        return {
            "server": start.server_id,
            "server_in_metadata": answered.get("janus-server"),
            "use_counter": start.use_counter,
            "snapshot_id": commit.snapshots[0].snapshot_id,
            "table_digest": commit.snapshots[0].table_digest.hex(),
            "delta": session.HasField("head"),
            "changed_blocks": len(changed),
            "sent_messages": sent,
        }

    def write(self, start, session, changed, new_blocks, hashes, pin):
        pb = self.pb["backup"]
        requests = queue.SimpleQueue()
        requests.put(pb.WriteBlocksRequest(session_id=session.session_id, epoch=start.epoch))
        sent = 1
        for batch in batches(self.pb["types"], changed, new_blocks, hashes):
            requests.put(pb.WriteBlocksRequest(batch=batch, epoch=start.epoch, session_id=session.session_id))
            sent += 1
        requests.put(
            pb.WriteBlocksRequest(session_id=session.session_id, epoch=start.epoch, settled_block=len(new_blocks))
        )
        sent += 1
        requests.put(None)
        acknowledged = 0
        stream = self.backup_service.WriteBlocks(iter(requests.get, None), metadata=pin, timeout=300)
        for answer in stream:
            acknowledged = answer.received_messages
        assert acknowledged == sent, f"sent {sent} messages, {acknowledged} acknowledged"
        return sent

    def restore(self, snapshot_id, path):
        server = next(s["server"] for s in self.list()["snapshots"] if s["snapshot_id"] == snapshot_id)
        pin = self.pin(server)
        pb, types = self.pb["restore"], self.pb["types"]
        opened = self.restore_service.OpenSnapshot(
            pb.OpenSnapshotRequest(snapshot_id=snapshot_id), metadata=pin, timeout=30
        )
        data = bytearray(opened.snapshot.size_bytes)
        request = pb.ReadBlocksRequest(handle=opened.handle, encodings=[types.ENCODING_NONE])
        for answer in self.restore_service.ReadBlocks(request, metadata=pin, timeout=300):
            self.take(answer.batch, data)
        self.restore_service.CloseSnapshot(pb.CloseSnapshotRequest(handle=opened.handle), metadata=pin, timeout=30)
        hashes = [block_hash(block) for block in blocks(bytes(data))]
        assert table_digest(len(data), hashes) == opened.snapshot.table_digest, "the restored disk is another"
        with open(path, "wb") as file:
            file.write(data)
        return {"server": server, "size_bytes": len(data)}

    def take(self, batch, data):
        assert batch.encoding in (0, self.pb["types"].ENCODING_NONE), "an encoding we did not offer"
        at = number = 0
        for extent in batch.extents:
            for block in range(extent.first_block, extent.first_block + extent.block_count):
                if extent.zero:
                    continue
                length = min(BLOCK, len(data) - block * BLOCK)
                content = batch.data[at : at + length]
                assert block_hash(content) == batch.hashes[number * 32 : number * 32 + 32], f"block {block}"
                data[block * BLOCK : block * BLOCK + length] = content
                at, number = at + length, number + 1


def explain(error):
    """Reason and message of a failed call."""
    reason = None
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    reason = info.reason
    return {"ok": False, "code": error.code().name, "reason": reason, "error": error.details()}


def main():
    parser = argparse.ArgumentParser()
    here = os.path.dirname(os.path.abspath(__file__))
    for name in ("--url", "--cert", "--key", "--ca", "--plain"):
        parser.add_argument(name)
    parser.add_argument("--pins", choices=["yes", "no"], default="yes")
    parser.add_argument("--stubs", default=os.path.join(here, "stubs"))
    parser.add_argument("command", choices=["vectors", "list", "backup", "restore", "check", "watch", "services"])
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    if args.command == "vectors":
        print(json.dumps({"ok": True, "checked": check_vectors(*args.arguments)}))
        return 0
    try:
        answer = getattr(Client(args), args.command)(*args.arguments)
    except grpc.RpcError as error:
        print(json.dumps(explain(error)))
        return 1
    print(json.dumps({"ok": True, **answer}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
