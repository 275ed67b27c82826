"""What version 0.1.0 left behind: its fingerprints, and stores with what its runs held."""

import hashlib
import sqlite3


def fingerprint(checkpoint):
    """Of every prunable tensor name, dtype, shape, and the first, middle and last 4 KiB; written anew from its page."""
    told = hashlib.sha256()
    for name in sorted(checkpoint.prunable):
        data = bytes(checkpoint.raw(name))
        middle = max(0, len(data) // 2 - 2048)
        told.update(f"{name} {checkpoint.dtype(name)} {checkpoint.shape(name)}\n".encode())
        told.update(data[:4096] + data[middle : middle + 4096] + data[max(0, len(data) - 4096) :])
    return told.hexdigest()[:16]


def forget(uri):
    """Takes from a sqlite store what 0.1.0 did not write: identities, the choice of rounding; its keys were others."""
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as store:
        store.execute("delete from params where key like 'identity/%' or key = 'cfg/rounding'")
        store.execute("update tags set value = '0' || substr(value, 2) where key in ('cell_key', 'mask_key')")
