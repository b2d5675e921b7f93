"""One process at a time, also on machines that share a disk."""


def take_lock(path):
    """-> a file that holds the lock until it is closed or its process ends; None while another process holds it.

    Closing any file of this path in the process gives the lock back. Loader processes do not inherit it."""
    file = open(path, "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except (ImportError, OSError):  # Windows, a disk without locks: nothing keeps two processes apart
        pass
    return file
