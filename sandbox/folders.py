"""Work folders: written for a program, and cleared whatever it left there.

All below a work folder is a program's: names of any bytes, links to anywhere, folders without
permissions and 20,000 deep. So no path of a program's is ever given to a tool or to the system:
each step takes one name below a folder that is open (dir_fd), and follows no link. Standard library
only: the launcher and the trainer import it.
"""

import errno
import itertools
import os
import stat
import time

# What all files of one job may take.
WORK_BYTES = 256 << 20
WORK_FILES = 16384  # folders included

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # where a name is to be moved to


def write_files(folder, files, user):
    """Write {path: Latin-1 text} below an empty folder.

    user: who owns them then; None when the launcher may not give files away.
    """
    for path, content in files.items():
        place = os.path.join(folder, path)
        if "/" in path:
            os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "xb") as file:
            file.write(content.encode("latin-1"))

    if user is None:
        return
    os.chown(folder, user, user)
    if files:
        for parent, folders, names in os.walk(folder):
            for name in folders + names:
                os.chown(os.path.join(parent, name), user, user, follow_symlinks=False)


def make_executable(folder, name):
    """Allow a file in the folder itself to be started, if there is such a file.

    A linker sets the mode by path, which a program may not do.
    """
    top = os.open(folder, _FOLDER)
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=top)
    except OSError:  # none, or a link: its start will fail, and say why
        return
    finally:
        os.close(top)

    if stat.S_ISREG(os.fstat(file).st_mode):
        os.fchmod(file, 0o755)
    os.close(file)


def clear(folder):
    """Remove everything in the folder; OSError when something stays.

    No recursion, three descriptors and linear time, however deep it is: what lies in an inner
    folder moves up, until every inner folder is empty.
    """
    os.chmod(folder, 0o700)
    top = os.open(folder, _FOLDER)
    numbers = itertools.count()
    try:
        while inner := _unlink_files(top):
            for name in inner:
                _move_up_folders(name, top, numbers)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def _unlink_files(place):
    """Remove all but the folders from an open folder. Returns their names."""
    folders = []
    with os.scandir(place) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=place)
    return folders


def _move_up_folders(name, top, numbers):
    """Empty the folder `name` of the open folder `top`: its folders get a number there for a name."""
    _permit(name, top)
    place = os.open(name, _FOLDER, dir_fd=top)
    try:
        for deeper in _unlink_files(place):
            _permit(deeper, place)  # its parent changes, which is a change of it
            _move(deeper, place, top, numbers)
    finally:
        os.close(place)


def _move(name, place, top, numbers):
    for number in numbers:
        try:
            os.rename(name, str(number), src_dir_fd=place, dst_dir_fd=top)
            return
        except OSError as error:  # a program may have given numbers for names
            if error.errno not in _TAKEN:
                raise


def _permit(name, parent):
    """Give the owner of a folder every right to it."""
    if not hasattr(os, "O_PATH"):  # macOS, where programs are not isolated anyhow
        os.chmod(name, 0o700, dir_fd=parent)
        return
    place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{place}", 0o700)
    finally:
        os.close(place)


def remove(folder):
    """Remove a folder, if it is there, and everything in it.

    After a killed launcher, whose programs may take a moment to die.
    """
    for _ in range(50):
        try:
            clear(folder)
            os.rmdir(folder)
        except OSError:
            if not os.path.lexists(folder):
                return
            time.sleep(0.02)
        else:
            return
