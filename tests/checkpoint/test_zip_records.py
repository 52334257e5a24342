from __future__ import annotations

import io
import os
import shutil
import subprocess
import zipfile
import zlib

import pytest
import torch

from trainbus.checkpoint.zip_records import ROOM, SUM_IN_ENTRY, SUM_IN_TAIL, Record, between, directory, entry


def archive(contents: dict[str, bytes]) -> bytes:
    """Return a file of these records."""
    file, records, last = bytearray(), [], None
    for name, data in contents.items():
        record = Record(name, len(data), sum=zlib.crc32(data))
        file += between(last, record, len(file)) + data
        records.append(record)
        last = record
    file += between(last, None, len(file))
    return bytes(file + end_of(records, len(file)))


def end_of(records: list[Record], start: int) -> bytes:
    return directory(b"".join(map(entry, records)), len(records), start)


CONTENTS = {"archive/a": b"hello", "archive/empty": b"", "archive/data/0": bytes(range(256)) * 9}


class TestArchive:
    def test_is_read_by_zipfile(self):
        """
        Python's zipfile finds every record and its sum right.
        """
        opened = zipfile.ZipFile(io.BytesIO(archive(CONTENTS)))

        assert {name: opened.read(name) for name in opened.namelist()} == CONTENTS
        assert opened.testzip() is None

    @pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
    def test_is_read_by_unzip(self, tmp_path):
        """
        The tool unzip has nothing to say against it.
        """
        (tmp_path / "a.zip").write_bytes(archive(CONTENTS))

        done = subprocess.run(["unzip", "-t", tmp_path / "a.zip"], capture_output=True, text=True)

        assert done.returncode == 0 and "No errors" in done.stdout and not done.stderr

    def test_wrong_sum_is_found(self):
        """
        The sum in the directory is the record's own.
        """
        data = archive(CONTENTS).replace(b"hello", b"hellO")

        assert zipfile.ZipFile(io.BytesIO(data)).testzip() == "archive/a"

    def test_more_than_four_gibibytes(self, tmp_path):
        """
        A record of 5 GiB, one behind it, and their directory are found by zipfile and by torch.
        """
        size = 5 << 30
        large, last = (
            Record("archive/data/0", size, sum=1),
            Record("archive/version", 2, sum=zlib.crc32(b"3\n")),
        )
        with open(tmp_path / "a.zip", "wb") as file:
            file.write(between(None, large, 0))
            file.seek(size, os.SEEK_CUR)
            file.write(between(large, last, file.tell()) + b"3\n")
            file.write(between(last, None, file.tell()))
            file.write(end_of([large, last], file.tell()))

        opened = zipfile.ZipFile(tmp_path / "a.zip")
        reader = torch._C.PyTorchFileReader(str(tmp_path / "a.zip"))

        assert [(one.filename, one.file_size, one.CRC) for one in opened.infolist()] == [
            ("archive/data/0", size, 1),
            ("archive/version", 2, zlib.crc32(b"3\n")),
        ]
        assert opened.read("archive/version") == reader.get_record("version") == b"3\n"
        assert reader.get_record_offset("data/0") == 128

    def test_more_than_65_thousand(self):
        """
        A directory of 70,000 records is read whole.
        """
        names = [f"archive/data/{number}" for number in range(70_000)]

        opened = zipfile.ZipFile(io.BytesIO(archive(dict.fromkeys(names, b""))))

        assert opened.namelist() == names


class TestSums:
    @pytest.mark.parametrize("size", [10, 5 << 30])
    def test_where_they_stand(self, size):
        """
        A record's sum stands where the constants say, behind it and in its entry, whatever its size.
        """
        without, with_sum = (Record("archive/data/0", size, 64, sum=number) for number in (0, 0x04030201))

        for make, at in ((lambda one: between(one, None, 0), SUM_IN_TAIL), (entry, SUM_IN_ENTRY)):
            expected = bytearray(make(without))
            expected[at : at + 4] = bytes([1, 2, 3, 4])
            assert make(with_sum) == expected


class TestBetween:
    def test_bytes_begin_where_asked(self):
        """
        A header fills what there is between two records, to the byte.
        """
        before = Record("archive/data/0", 10, sum=1)
        for start in range(1000, 1064):
            after = Record("archive/data/1234567", 1 << 40)
            assert len(between(before, after, start, start + ROOM + 63)) == ROOM + 63

    def test_room_is_enough(self):
        """
        `ROOM` bytes hold the sum of a large record and the header of another with the longest name.
        """
        before, after = Record("a", 1 << 40, sum=1), Record("archive/data/1234567", 1 << 40)

        assert len(between(before, after, 64, 64 + ROOM)) == ROOM

    def test_no_room(self):
        """
        Too little room, or more than a padding can fill, is refused.
        """
        for stop in (64 + 20, 64 + (1 << 17)):
            with pytest.raises(ValueError, match="does not fill"):
                between(None, Record("archive/data/0", 1), 64, stop)

    def test_aligned_by_itself(self):
        """
        Without a place of its own, a record begins at a multiple of 64.
        """
        for start in range(300, 400):
            assert (start + len(between(None, Record("archive/version", 2), start))) % 64 == 0
