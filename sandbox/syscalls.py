"""System-call numbers of what the seccomp filter names.

x86_64 is tested; aarch64 is from the kernel's generic table and untested.
"""

import os

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64); None where the architecture has no such call.
# Refused with EPERM whatever the arguments:
DENIED_NUMBERS = {
    # processes
    "unshare": (272, 97), "setns": (308, 268), "setsid": (112, 157), "setpgid": (109, 154),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "seccomp": (317, 277),
    # network and other ways out; sendmsg: descriptors under way are counted per user
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    # memory in pipes that no limit counts
    "vmsplice": (278, 75), "tee": (276, 77),
    # what happens in folders that Landlock closes, 128 watchers per user; who has read a file
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "cachestat": (451, 451),
    # objects that outlive a process
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "memfd_secret": (447, 447), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218),
    # files by path that Landlock does not govern
    "chown": (92, None), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
    "mknod": (133, None), "mknodat": (259, 33), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262), "sync": (162, 81), "syncfs": (306, 267), "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # mounts
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467), "statmount": (457, 457), "listmount": (458, 458),
    # parts of the kernel that no program under test needs, each with a history of holes
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "io_setup": (206, 0), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116),
    "acct": (163, 89), "settimeofday": (164, 170), "adjtimex": (159, 171),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "vhangup": (153, 58), "lookup_dcookie": (212, 18),
}  # fmt: skip

# Answered (EOPNOTSUPP) as by a file system that cannot: programs know how to do without.
UNSUPPORTED_NUMBERS = {
    "fallocate": (285, 47),  # disk that no count of written bytes sees
    # marks of files that Landlock closes
    "getxattr": (191, 8), "lgetxattr": (192, 9), "listxattr": (194, 11), "llistxattr": (195, 12),
    "getxattrat": (464, 464), "listxattrat": (465, 465),
    # which pages of a file are in memory: one program's mark for another
    "preadv2": (327, 286), "mincore": (27, 232),
}  # fmt: skip

# Refused where nothing but this filter protects files that are not the program's; where all but its
# own are mounted read-only, they change its own alone. Landlock governs truncate from Linux 6.2 on.
ON_FILES_NUMBERS = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "fchown": (93, 55), "truncate": (76, 45), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "fsetxattr": (190, 7),
    "fremovexattr": (199, 16),
}  # fmt: skip

# Allowed with some arguments only, or called by the launcher itself:
OTHER_NUMBERS = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "socketpair": (53, 199), "fcntl": (72, 25), "ioctl": (16, 29),
    "memfd_create": (319, 279), "capset": (126, 91), "prctl": (157, 167), "mmap": (9, 222),
    "fadvise64": (221, 223),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}  # fmt: skip

_COLUMN = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)

ALL_NUMBERS = DENIED_NUMBERS | UNSUPPORTED_NUMBERS | ON_FILES_NUMBERS | OTHER_NUMBERS

# On this machine: number of every call that it has, and the names of those that are always refused.
NUMBER = {}
if _COLUMN is not None:
    for _name, _numbers in ALL_NUMBERS.items():
        if _numbers[_COLUMN] is not None:
            NUMBER[_name] = _numbers[_COLUMN]
DENIED = tuple(name for name in DENIED_NUMBERS if name in NUMBER)
