"""Changes NTFS images through libntfs-3g, as a test asks: one JSON object a line in, one out.

libntfs writes no change journal and no log; both are written here, as Windows would leave them. It updates no times
either, so that an overwritten file has the MFT record it had: only the journal tells.
"""

import ctypes, ctypes.util, itertools, json, os, struct, sys

lib = ctypes.CDLL(ctypes.util.find_library("ntfs-3g"), use_errno=True)
P, S64, U32, U8 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint8
for name, result, arguments in [
    ("ntfs_mount", P, [ctypes.c_char_p, ctypes.c_ulong]),
    ("ntfs_umount", ctypes.c_int, [P, ctypes.c_int]),
    ("ntfs_pathname_to_inode", P, [P, P, ctypes.c_char_p]),
    ("ntfs_create", P, [P, U32, P, U8, U32]),
    ("ntfs_inode_open", P, [P, ctypes.c_uint64]),
    ("ntfs_inode_close", ctypes.c_int, [P]),
    ("ntfs_attr_add", ctypes.c_int, [P, U32, P, U8, P, S64]),
    ("ntfs_attr_remove", ctypes.c_int, [P, U32, P, U32]),
    ("ntfs_attr_open", P, [P, U32, P, U32]),
    ("ntfs_attr_close", None, [P]),
    ("ntfs_attr_pwrite", S64, [P, S64, S64, P]),
    ("ntfs_attr_pread", S64, [P, S64, S64, P]),
    ("ntfs_attr_vcn_to_lcn", S64, [P, S64]),
    ("ntfs_attr_truncate", ctypes.c_int, [P, S64]),
    ("ntfs_delete", ctypes.c_int, [P, ctypes.c_char_p, P, P, P, U8]),
    ("ntfs_link", ctypes.c_int, [P, P, P, U8]),
    ("ntfs_volume_write_flags", ctypes.c_int, [P, ctypes.c_uint16]),
]:
    function = getattr(lib, name)
    function.restype, function.argtypes = result, arguments

DATA, UNNAMED = 0x80, ctypes.addressof(ctypes.c_uint16.in_dll(lib, "AT_UNNAMED"))
FILE, FOLDER = 0o100000, 0o040000
PAGE = 4096
# No two records are of one time, as on a clock that goes on after a roll-back.
TIMES = itertools.count(133_000_000_000_000_000, 10_000)
PATTERN = bytes((i * 7 + i // 251) & 0xFF for i in range(1 << 20))


def check(value, what):
    if not value:
        raise OSError(ctypes.get_errno(), what)
    return value


def wide(name):
    data = name.encode("utf-16-le")
    return ctypes.create_string_buffer(data + b"\0\0"), len(data) // 2


def reference(inode):
    number = ctypes.c_uint64.from_address(inode).value
    record = ctypes.c_uint64.from_address(inode + 8).value
    return number | ctypes.c_uint16.from_address(record + 16).value << 48


def record(version, file, reason, at):
    """A record at `at`. In a journal with range tracking (version 4) those of overwriting tell ranges and no time."""
    name = "f".encode("utf-16-le") * 8
    if version == 4 and reason & 1:
        ranges = [(number << 16, 1 << 16) for number in range(1 + file % 3)]
        length = 64 + 16 * len(ranges)
        data = struct.pack("<IHHQQQQQIIIHH", length, 4, 0, file, 0, 5, 0, at, reason, 0, 0, len(ranges), 16)
        return data + b"".join(struct.pack("<qq", *one) for one in ranges)
    head = 60 if version == 2 else 76
    length = (head + len(name) + 7) // 8 * 8
    if version == 2:
        data = struct.pack("<IHHQQQQIIIIHH", length, 2, 0, file, 5, at, next(TIMES), reason, 0, 0, 0, len(name), head)
    else:
        data = struct.pack("<IHHQQQQQQIIIIHH", length, 3, 0, file, 0, 5, 0, at, next(TIMES), reason, 0, 0, 0, len(name), head)
    return (data + name).ljust(length, b"\0")


class Stream:
    def __init__(self, inode, name=""):
        self.inode, (self.name, self.len) = inode, wide(name)
        if not name:
            self.name, self.len = ctypes.cast(UNNAMED, P), 0
        self.attribute = None

    def __enter__(self):
        self.attribute = check(lib.ntfs_attr_open(self.inode, DATA, self.name, self.len), "open stream")
        return self

    def __exit__(self, *_):
        lib.ntfs_attr_close(self.attribute)

    def write(self, offset, data):
        done = 0
        while done < len(data):
            count = lib.ntfs_attr_pwrite(self.attribute, offset + done, len(data) - done, data[done:])
            check(count > 0, "write")
            done += count

    def read(self, offset, count):
        buffer = ctypes.create_string_buffer(count)
        check(lib.ntfs_attr_pread(self.attribute, offset, count, buffer) == count, "read")
        return buffer.raw

    def truncate(self, size):
        check(lib.ntfs_attr_truncate(self.attribute, size) == 0, "truncate")


class Volume:
    # Where the log of each image is.
    logs = {}

    def __init__(self, path):
        self.path = path
        if path in self.logs:
            # libntfs refuses a log that isn't its own: it gets the empty one that it knows.
            with open(path, "r+b") as image:
                image.seek(self.logs[path])
                image.write(b"\xff" * 2 * PAGE)
        self.volume = check(lib.ntfs_mount(path.encode(), 0), f"mount {path}")

    def open(self, path):
        return check(lib.ntfs_pathname_to_inode(self.volume, None, path.encode()), f"find {path}")

    def make(self, path, kind):
        folder, name = os.path.split(path)
        above = self.open(folder or "/")
        inode = lib.ntfs_create(above, 0, *wide(name), kind)
        error = ctypes.get_errno()
        lib.ntfs_inode_close(above)
        if not inode:
            raise OSError(error, f"make {path}")
        return inode

    def of(self, path, work, make=False):
        inode = self.make(path, FILE) if make else self.open(path)
        try:
            return work(inode)
        finally:
            check(lib.ntfs_inode_close(inode) == 0, "close")

    # Each answers the file's reference.
    def mkdir(self, path):
        inode = self.make(path, FOLDER)
        found = reference(inode)
        lib.ntfs_inode_close(inode)
        return found

    def write(self, path, offset, length, seed, make=False):
        def work(inode):
            with Stream(inode) as stream:
                start = seed * 4099 % (1 << 19)
                data = (PATTERN[start:] + PATTERN)[: 1 << 20]
                stream.write(offset, (data * (length // len(data) + 1))[:length])
            return reference(inode)

        return self.of(path, work, make)

    def truncate(self, path, size):
        def work(inode):
            with Stream(inode) as stream:
                stream.truncate(size)
            return reference(inode)

        return self.of(path, work)

    def delete(self, path):
        inode = self.open(path)
        found = reference(inode)
        folder, name = os.path.split(path)
        check(lib.ntfs_delete(self.volume, path.encode(), inode, self.open(folder or "/"), *wide(name)) == 0, "delete")
        return found

    def rename(self, path, to):
        inode = self.open(path)
        found = reference(inode)
        folder, name = os.path.split(to)
        above = self.open(folder or "/")
        check(lib.ntfs_link(inode, above, *wide(name)) == 0, "link")
        lib.ntfs_inode_close(above)
        lib.ntfs_inode_close(inode)
        self.delete(path)
        return found

    def move(self, path):
        """Gives a file other clusters, as a defragmenter does: the content stays."""
        def work(inode):
            with Stream(inode) as stream:
                size = ctypes.c_int64.from_address(stream.attribute + 56).value  # data_size
                data = stream.read(0, size) if 0 < size < 1 << 24 else b""
                stream.truncate(0)
            return data

        data = self.of(path, work)
        self.write("/.filler", 0, max(len(data), 4096), 1, make=True)

        def put(inode):
            with Stream(inode) as stream:
                stream.write(0, data)
            return reference(inode)

        found = self.of(path, put)
        self.delete("/.filler")
        return found

    # The journal.
    def journal(self, identity, start, lowest=0):
        extend = check(lib.ntfs_inode_open(self.volume, 11), "open $Extend")
        inode = check(lib.ntfs_create(extend, 0, *wide("$UsnJrnl"), FILE), "make $UsnJrnl")
        lib.ntfs_inode_close(extend)
        lib.ntfs_attr_remove(inode, DATA, ctypes.cast(UNNAMED, P), 0)
        maximum = struct.pack("<QQQQ", 1 << 20, 1 << 18, identity, lowest)
        check(lib.ntfs_attr_add(inode, DATA, *wide("$Max"), maximum, 32) == 0, "add $Max")
        check(lib.ntfs_attr_add(inode, DATA, *wide("$J"), None, 0) == 0, "add $J")
        with Stream(inode, "$J") as stream:
            stream.truncate(start)
        check(lib.ntfs_inode_close(inode) == 0, "close journal")
        self.usn = start

    def of_journal(self, work):
        extend = check(lib.ntfs_inode_open(self.volume, 11), "open $Extend")
        inode = lib.ntfs_pathname_to_inode(self.volume, extend, b"$UsnJrnl")
        try:
            return work(check(inode, "find $UsnJrnl"))
        finally:
            lib.ntfs_inode_close(inode)

    def delete_journal(self):
        extend = check(lib.ntfs_inode_open(self.volume, 11), "open $Extend")
        inode = check(lib.ntfs_pathname_to_inode(self.volume, extend, b"$UsnJrnl"), "find $UsnJrnl")
        check(lib.ntfs_delete(self.volume, None, inode, extend, *wide("$UsnJrnl")) == 0, "delete journal")

    def records(self, start, records, version=2):
        """Appends records (reference, reason) at `start`; answers where the next one goes."""
        def work(inode):
            at = start
            with Stream(inode, "$J") as stream:
                for file, reason in records:
                    data = record(version, file, reason, at)
                    if at // PAGE != (at + len(data) - 1) // PAGE:
                        at = (at + PAGE - 1) // PAGE * PAGE
                        data = record(version, file, reason, at)
                    stream.write(at, data)
                    at += len(data)
            return at

        return self.of_journal(work)

    def journal_bytes(self, start, end):
        def work(inode):
            with Stream(inode, "$J") as stream:
                return stream.read(start, end - start)

        return self.of_journal(work)

    def cut_journal(self, at, end):
        """Ends the journal, which ends at `end`, in the middle of the record at `at`; answers where, or nothing."""
        def work(inode):
            with Stream(inode, "$J") as stream:
                start = at // PAGE * PAGE
                page = stream.read(start, min(start + PAGE, end) - start)
                place = 0
                while place + 64 <= len(page):
                    length, major = struct.unpack_from("<IH", page, place)
                    usn = struct.unpack_from("<Q", page, place + (24 if major == 2 else 40))[0]
                    if usn != start + place:
                        return None
                    if start + place + length > at:
                        stream.truncate(start + place + 24)
                        return start + place + 24
                    place += length
            return None

        return self.of_journal(work)

    def flags(self, flags):
        check(lib.ntfs_volume_write_flags(self.volume, flags) == 0, "write flags")

    def write_journal(self, offset, data):
        def work(inode):
            with Stream(inode, "$J") as stream:
                stream.write(offset, data)

        self.of_journal(work)

    def close(self, lsn, clean=True):
        """Leaves the log as Windows does; unmounts."""
        page = bytearray(PAGE)
        struct.pack_into("<4sHHQIIHhh", page, 0, b"RSTR", 30, 9, 0, PAGE, PAGE, 48, 1, 1)
        struct.pack_into("<QHHHH", page, 48, lsn, 1, 0xFFFF, 0xFFFF if clean else 0, 2 if clean else 0)
        struct.pack_into("<H", page, 30, 1)
        for number in range(8):
            end = number * 512 + 510
            page[32 + 2 * number : 34 + 2 * number] = page[end : end + 2]
            page[end : end + 2] = b"\1\0"
        log = check(lib.ntfs_inode_open(self.volume, 2), "open $LogFile")
        with Stream(log) as stream:
            stream.write(0, bytes(page) * 2)
            with open(self.path, "rb") as image:
                boot = image.read(16)
            cluster = struct.unpack_from("<H", boot, 11)[0] * boot[13]
            self.logs[self.path] = lib.ntfs_attr_vcn_to_lcn(stream.attribute, 0) * cluster
        lib.ntfs_inode_close(log)
        bitmap = check(lib.ntfs_inode_open(self.volume, 6), "open $Bitmap")
        with Stream(bitmap) as stream:
            size = self.bitmap_bytes
            data = stream.read(0, size)
        lib.ntfs_inode_close(bitmap)
        check(lib.ntfs_umount(self.volume, 0) == 0, "unmount")
        return data


def run(request):
    volume = Volume(request["image"])
    volume.bitmap_bytes = request["bitmap_bytes"]
    answers = []
    for operation in request["operations"]:
        name, *arguments = operation
        if name == "keep_tail":
            # The journal loses its front: the same records from `first` on in a journal that begins there.
            first, end, identity = arguments
            tail = volume.journal_bytes(first, end)
            volume.delete_journal()
            volume.journal(identity, first)
            volume.write_journal(first, tail)
            answers.append(None)
        elif name == "corrupt":
            volume.write_journal(arguments[0], bytes.fromhex(arguments[1]))
            answers.append(None)
        else:
            answers.append(getattr(volume, name)(*arguments))
    bitmap = volume.close(request["lsn"], request.get("clean", True))
    return {"answers": answers, "bitmap": bitmap.hex()}


for line in sys.stdin:
    try:
        answer = run(json.loads(line))
    except OSError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
