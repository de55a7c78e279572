"""Every tool that a Bash script may start does its work inside the walls.

The list is that of sandbox/languages/bash.toml; what is left out stands in docs/sandbox.md.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from sandbox import Job, Pool
from sandbox.languages import load_language
from sandbox.probe import available_level, probe

DOCS = Path(__file__).resolve().parent.parent / "docs" / "sandbox.md"
TOOLS = load_language("bash").isolation["execute"]

# Of coreutils, what the walls forbid; each has its reason in docs/sandbox.md.
FORBIDDEN = [
    "chcon", "chgrp", "chown", "chroot", "df", "groups", "hostid", "logname", "mkfifo", "mknod",
    "pinky", "runcon", "stty", "users", "who", "whoami",
]  # fmt: skip

# What each prints. "abc" is what md5sum's authors test it by: RFC 1321, A.5.
PROGRAMS = {
    "[": ("env [ 1 -lt 2 ] && echo yes", "yes"),
    "arch": ("[ $(arch) = $(uname -m) ] && echo same", "same"),
    "awk": ("echo '3 4' | awk '{ print $1 * $2 }'", "12"),
    "b2sum": ("printf abc | b2sum | cut -c 1-8", "ba80a53f"),  # RFC 7693, appendix A
    "base32": ("printf abc | base32 | base32 -d", "abc"),
    "base64": ("printf abc | base64; echo YWJj | base64 -d", "YWJj\nabc"),
    "basename": ("basename /a/b.txt .txt", "b"),
    "basenc": ("printf abc | basenc --base16", "616263"),
    "bc": ("echo '2 ^ 70' | bc; echo 's(0)' | bc -l", "1180591620717411303424\n0"),
    "bunzip2": ("echo abc > f; bzip2 f; bunzip2 f.bz2; cat f", "abc"),
    "bzcat": ("echo abc | bzip2 > f.bz2; bzcat f.bz2", "abc"),
    "bzip2": ("echo abc | bzip2 -9 | bzip2 -d", "abc"),
    "cal": ("cal 2 2024 | grep -c 29", "1"),
    "cat": ("echo abc | cat -A - /dev/null", "abc$"),
    "chmod": ("umask 077; echo > f; chmod 640 f; stat -c %a f", "640"),
    "cksum": ("printf abc | cksum", "1219131554 3"),  # POSIX's own checksum
    "cmp": ("echo a > f; echo b > g; cmp -l f g; cmp f f && echo same", "1 141 142\nsame"),
    "col": (r"printf 'a\bb\n' | col -b", "b"),
    "colrm": ("echo abcdef | colrm 2 4", "aef"),
    "column": (r"printf 'a bb\nccc d\n' | column -t", "a    bb\nccc  d"),
    "comm": (r"comm -12 <(printf 'a\nb\n') <(printf 'b\nc\n')", "b"),
    "cp": ("mkdir d; echo abc > d/f; cp -r d e; cp -p e/f g; cat e/f g", "abc\nabc"),
    "csplit": (r"printf 'a\nb\nc\n' > f; csplit -s f 2; cat xx01", "b\nc"),
    "cut": ("echo a:b:c | cut -d: -f2-", "b:c"),
    "date": ("TZ=Asia/Tokyo date -d @0 '+%F %T %Z'; date -u -d '2024-02-28 + 2 days' +%A",
             "1970-01-01 09:00:00 JST\nFriday"),
    "dc": ("echo '2 70 ^ p' | dc", "1180591620717411303424"),
    "dd": ("printf abcdef | dd bs=1 skip=2 count=3 2> /dev/null", "cde"),
    "diff": ("diff <(echo a) <(echo b)", "1c1\n< a\n---\n> b"),
    "diff3": ("echo a > f; echo b > g; diff3 f f g", "====3\n1:1c\n2:1c\n  a\n3:1c\n  b"),
    "dir": ("touch f g; dir -1 f g", "f\ng"),
    "dircolors": ("dircolors -p | grep -c '^DIR '", "1"),
    "dirname": ("dirname /a/b.txt", "/a"),
    "du": ("mkdir d; head -c 5000 /dev/zero > d/f; du -b d/f; du -s d | cut -f2", "5000\td/f\nd"),
    "echo": ("env echo -e 'a\\tb'", "a\tb"),
    "egrep": (r"printf 'a1\nb\n' | egrep '[0-9]+|x' 2> /dev/null", "a1"),
    "env": ("env A=abc bash -c 'echo $A' 2> /dev/null; env -i A=1 env", "abc\nA=1"),
    "envsubst": ("echo 'a $A' | A=b envsubst", "a b"),
    "expand": (r"printf 'a\tb\n' | expand -t 4", "a   b"),
    "expr": ("expr 6 '*' 7; expr length abc", "42\n3"),
    "factor": ("factor 84", "84: 2 2 3 7"),
    "false": ("env false || echo no", "no"),
    "fgrep": (r"printf 'a.b\naxb\n' | fgrep a.b 2> /dev/null", "a.b"),
    "file": ("echo abc > f; file -b f", "ASCII text"),
    "find": ("mkdir -p d/e; echo abc > d/e/f; find d -name f -type f -print -exec cat {} ';';"
             " find d -name f | xargs sh -c 'wc -c < $0'; find d -delete; ls", "d/e/f\nabc\n4\nmain.sh"),
    "flock": ("touch f; flock f echo locked", "locked"),
    "fmt": ("echo 'a b c d' | fmt -w 4", "a b\nc d"),
    "fold": ("echo abcdef | fold -w 4", "abcd\nef"),
    "gawk": ("gawk 'BEGIN { printf \"%s %d\\n\", gensub(/b+/, \"x\", 1, \"abbc\"), and(12, 10) }'",
             "axc 8"),
    "getconf": ("getconf INT_MAX", "2147483647"),
    "getopt": ("getopt -o ab: -- -b 1 -a c", " -b '1' -a -- 'c'"),
    "grep": (r"echo 'a12 b' | grep -oP '\d+(?= b)'", "12"),
    "gunzip": ("echo abc > f; gzip f; gunzip f.gz; cat f", "abc"),
    "gzip": ("echo abc | gzip -9 | gzip -dc", "abc"),
    "hd": ("printf abc | hd | head -1 | cut -c 11-18", "61 62 63"),
    "head": (r"printf 'a\nb\nc\n' | head -n -1", "a\nb"),
    "hexdump": ("printf abc | hexdump -ve '1/1 \"%02x\"'", "616263"),
    "iconv": ("printf 'caf\\xe9' | iconv -f latin1 -t utf8", "café"),
    "id": ("[ $(id -u) = $UID ] && echo same", "same"),
    "install": ("echo abc > f; install -D -m 600 f d/g; cat d/g; stat -c %a d/g", "abc\n600"),
    "join": (r"join <(printf '1 a\n2 b\n') <(printf '2 c\n')", "2 b c"),
    "jq": ("""echo '{"a": [1, 2]}' | jq -c '.a | map(. * 2)'""", "[2,4]"),
    "link": ("echo abc > f; link f g; cat g", "abc"),
    "ln": ("echo abc > f; ln -s f g; ln f h; cat g h; readlink g", "abc\nabc\nf"),
    "locale": ("locale charmap", "UTF-8"),
    "look": (r"printf 'apple\nbee\n' > f; look be f", "bee"),
    "ls": ("mkdir d; touch d/b d/a; ls d; ls -ln d | wc -l", "a\nb\n3"),
    "mawk": ("mawk 'BEGIN { print substr(\"abcdef\", 2, 3), toupper(\"x\") }'", "bcd X"),
    "md5sum": ("printf abc | md5sum; printf abc > f; md5sum f > g; md5sum -c g",
               "900150983cd24fb0d6963f7d28e17f72  -\nf: OK"),
    "mkdir": ("mkdir -p -m 700 a/b; ls -d a/b", "a/b"),
    "mktemp": ("f=$(mktemp); echo abc > $f; cat $f; d=$(mktemp -d); touch $d/a; ls $d", "abc\na"),
    "more": ("echo abc | more", "abc"),
    "mv": ("mkdir d; echo abc > f; mv f d/g; mv d e; cat e/g", "abc"),
    "nice": ("echo $(($(nice -n 5 nice) - $(nice)))", "5"),
    "nl": ("echo abc | nl -w 1 -s :", "1:abc"),
    "nohup": ("nohup echo abc 2> /dev/null", "abc"),
    "nproc": ("nproc --all > /dev/null && nproc | grep -c '^[0-9]'", "1"),
    "numfmt": ("numfmt --to=iec 2048", "2.0K"),
    "od": ("printf abc | od -An -tx1", " 61 62 63"),
    "paste": (r"printf '1\n2\n3\n' | paste -sd+", "1+2+3"),
    "patch": ("echo a > f; echo b > g; diff f g | patch -s f; cat f", "b"),
    "pathchk": ("pathchk -p a/b && echo good", "good"),
    "pr": (r"printf 'a\nb\n' | pr -2 -t -s: -l 1", "a:b"),
    "printenv": ("A=abc printenv A", "abc"),
    "printf": ("env printf '%05.1f|%x\\n' 3.14159 255", "003.1|ff"),
    "ptx": ("echo 'a bee' | ptx -G -w 20 | wc -l", "2"),
    "pwd": ("mkdir d; cd d; [ $(env pwd) = $HOME/d ] && echo home", "home"),
    "readlink": ("ln -s f g; readlink g; touch f; basename $(readlink -f g)", "f\nf"),
    "realpath": ("mkdir -p d/e; realpath --relative-to=d/e .; realpath -m /a/../b", "../..\n/b"),
    "rev": ("echo café | rev", "éfac"),
    "rm": ("mkdir -p d/e; touch d/e/f; rm -rf d; ls", "main.sh"),
    "rmdir": ("mkdir -p a/b; rmdir -p a/b; ls", "main.sh"),
    "sdiff": ("sdiff -s -w 20 <(echo a) <(echo b) | tr -d '\\t '", "a|b"),
    "sed": ("echo abc > f; sed -i 's/b/x/' f; sed -E 's/(a)(x)/\\2\\1/' f", "xac"),
    "seq": ("seq -s, 1 0.5 2", "1.0,1.5,2.0"),
    "sh": ("sh -c 'echo $((6 * 7))'; echo 'echo $1' > f; sh f abc", "42\nabc"),
    "sha1sum": ("printf abc | sha1sum | cut -c 1-8", "a9993e36"),  # FIPS 180-4, its examples
    "sha224sum": ("printf abc | sha224sum | cut -c 1-8", "23097d22"),
    "sha256sum": ("printf abc | sha256sum | cut -c 1-8", "ba7816bf"),
    "sha384sum": ("printf abc | sha384sum | cut -c 1-8", "cb00753f"),
    "sha512sum": ("printf abc | sha512sum | cut -c 1-8", "ddaf35a1"),
    "shred": ("echo abc > f; shred -u f; ls", "main.sh"),
    "shuf": ("shuf -i 1-9 | sort | paste -sd ''; shuf -n 1 -e a", "123456789\na"),
    "sleep": ("sleep 0.01 && echo awake", "awake"),
    "sort": (r"printf 'é 10\nz 9\na 9\n' | sort -k2,2n -k1,1; printf 'v1.10\nv1.9\n' | sort -V",
             "a 9\nz 9\né 10\nv1.9\nv1.10"),
    "split": (r"printf 'a\nb\nc\n' | split -l 2 - p; cat pab", "c"),
    "stat": ("printf abc > f; stat -c '%s %n %F' f", "3 f regular file"),
    "stdbuf": ("echo abc | stdbuf -oL cat", "abc"),
    "sum": ("printf abc | sum", "16556     1"),  # BSD's: rotate right, add, for a, b, c
    "sync": ("echo abc > f; sync f && echo done", "done"),
    "tac": (r"printf 'a\nb\n' | tac", "b\na"),
    "tail": (r"printf 'a\nb\nc\n' | tail -n +2", "b\nc"),
    "tar": ("mkdir d; echo abc > d/f; tar czf t.gz d; rm -r d; tar xzf t.gz; cat d/f", "abc"),
    "tee": ("echo abc | tee f; cat f", "abc\nabc"),
    "test": ("touch f; env test -f f && echo file", "file"),
    "timeout": ("timeout 5 echo abc", "abc"),
    "touch": ("touch -d @86400 f; stat -c %Y f; touch -r f g; stat -c %Y g", "86400\n86400"),
    "tr": ("echo abc | tr a-y b-z | tr -d c", "bd"),
    "true": ("env true && echo yes", "yes"),
    "truncate": ("truncate -s 5 f; stat -c %s f", "5"),
    "tsort": (r"printf 'a b\nb c\n' | tsort | paste -sd ''", "abc"),
    "tty": ("tty; echo $?", "not a tty\n1"),
    "ul": ("echo abc | ul -t dumb", "abc"),
    "uname": ("uname -s", "Linux"),
    "unexpand": ("echo '        a' | unexpand", "\ta"),
    "uniq": (r"printf 'a\na\nb\n' | uniq -c | tr -d ' '", "2a\n1b"),
    "unlink": ("touch f; unlink f; ls", "main.sh"),
    "unxz": ("echo abc > f; xz f; unxz f.xz; cat f", "abc"),
    "vdir": ("touch f; vdir -n f | wc -l", "1"),
    "wc": ("echo 'a é' | wc -lwmc | tr -s ' '", " 1 2 4 5"),
    "which": ("[ $(which cat) -ef $(type -P cat) ] && echo same; which nonesuch || echo none",
              "same\nnone"),
    "xargs": ("seq 4 | xargs -n 2 -P 2 echo | sort", "1 2\n3 4"),
    "xxd": ("printf abc | xxd -p; echo 616263 | xxd -r -p", "616263\nabc"),
    "xz": ("echo abc | xz | xz -d", "abc"),
    "xzcat": ("echo abc | xz > f.xz; xzcat f.xz", "abc"),
    "yes": ("yes abc | head -2", "abc\nabc"),
    "zcat": ("echo abc | gzip > f.gz; zcat f.gz", "abc"),
}  # fmt: skip


def levels():
    """Those with walls that this machine can give."""
    best = available_level(probe())[0]
    return {"portable": [], "kernel": ["kernel"], "namespaces": ["kernel", "namespaces"]}[best]


@pytest.fixture(scope="module", params=levels())
def pool(request):
    with Pool(workers=1, level=request.param) as pool:
        yield pool


def test_each_tool_of_the_list_is_tried():
    assert set(PROGRAMS) == set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_script_can_use(pool, tool):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    script, expected = PROGRAMS[tool]
    result = pool.submit(Job("bash", {"main.sh": script})).result()
    assert result.stdout.decode().rstrip("\n") == expected, result
    assert result.stderr == b"", result


def test_coreutils_is_whole_but_for_what_the_walls_forbid():
    if shutil.which("dpkg") is None:
        pytest.skip("only Debian's dpkg says what belongs to coreutils")
    listed = subprocess.run(["dpkg", "-L", "coreutils"], capture_output=True, text=True, check=True)
    folders = ("/bin", "/usr/bin", "/usr/sbin")
    paths = [Path(line) for line in listed.stdout.splitlines()]
    names = {path.name for path in paths if str(path.parent) in folders}
    assert names - set(TOOLS) - {"md5sum.textutils"} == set(FORBIDDEN)


def test_what_is_forbidden_has_its_reason_in_the_documentation():
    text = DOCS.read_text()
    assert [tool for tool in FORBIDDEN if f"`{tool}`" not in text] == []
