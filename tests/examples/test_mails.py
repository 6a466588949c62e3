"""The mail extract holds nobody's name, address or number, and its answers are what Python reads."""

from __future__ import annotations

import email
import email.message
import email.utils
import json
import re

from tests.programs import ROOT

FOLDER = ROOT / "examples" / "mails"
TEXT = (FOLDER / "mails.json").read_text(encoding="utf-8")
PARTS = json.loads(TEXT)
ALL = [mail for part in PARTS.values() for mail in part]
LINES = ("From", "To", "Date", "Subject", "List-Id", "Content-Type", "X-Mailer")
# The most common given names and surnames of the English-speaking world that are not common words as well.
NAMES = """
    aaron adam adams alan albert alex alexander alice allen amanda amy anderson andrea andrew angela ann
anna anne anthony antonio arthur ashley barbara benjamin betty beverly brandon brenda brian bruce
bryan campbell carl carlos carolyn catherine charles cheryl chris christina christine christopher
clark craig cynthia daniel daniels danielle david davis deborah debra denise dennis diana diane
donald donna doris dorothy douglas dylan edward edwards elizabeth emily emma eric ethan eugene evans
evelyn frances gabriel garcia garrigues gary george gerald gloria gonzalez gordon gregory hannah
harris heather helen henry hernandez howard jacob jacqueline james janet jason jeff jeffrey jennifer
jeremy jessica joan jonathan jones jordan jose joseph joshua juan judith judy julia julie justin
karen katherine kathleen kathryn keith kelly kenneth kevin khare kimberly kyle larry laura lauren
lawrence lewis linda lisa logan lopez louis madison margaret maria marie marilyn martha martin
martinez mason matthew megan melissa michael michelle miller mitchell nancy nathan nelson nicholas
nicole noah olivia pamela patricia patrick peterson philip phillips rachel ralph randy raymond
rebecca richard roberts robert robertson robinson rodriguez roger ronald roy russell ruth samantha
samuel sandra sara sarah shirley smith sophia stephanie stephen steven susan taylor teresa theresa
thomas thompson timothy tyler vincent virginia walter wayne wilson zachary""".split()


def test_the_parts_have_the_sizes_that_the_demo_says() -> None:
    assert {name: len(part) for name, part in PARTS.items()} == {"train": 128, "heldout": 48, "extra": 8}


def parsed(mail: dict[str, str]) -> email.message.Message:
    return email.message_from_string(f"{mail['header']}\n\n")


def test_answers_are_what_the_email_module_reads() -> None:
    for mail in ALL:
        message = parsed(mail)
        listed = re.search(r"<([\w-]+)\.", str(message["list-id"] or ""))
        assert mail["answer"] == {
            "date": email.utils.parsedate_to_datetime(str(message["date"])).date().isoformat(),
            "domain": email.utils.parseaddr(str(message["from"]))[1].rpartition("@")[2],
            "list": listed[1] if listed else None,
            "subject": str(message["subject"]),
        }


def test_people_are_masked() -> None:
    for message in map(parsed, ALL):
        assert set(message) <= set(LINES)
        assert message.get_payload() == ""
        for field in ("From", "To"):
            # What is left of the field once masked people are taken out is punctuation.
            left = re.sub(r"Person \d+|user\d+@([a-z]+\.)+example", "", message[field])
            assert re.fullmatch(r'[\s"<>(),]*', left), message[field]
        for field in set(message) - {"From", "To"}:
            assert "@" not in message[field]


def test_no_address_but_masked_ones() -> None:
    addresses = re.findall(r"[^\s<>\"(),:]+@[^\s<>\"(),\\]+", TEXT)
    assert len(addresses) > 2 * len(ALL)
    assert [a for a in addresses if not re.fullmatch(r"user\d+@([a-z]+\.)*[a-z]{7}\.example", a)] == []


def test_no_numbers_that_reach_somebody() -> None:
    dates = re.compile(r'"date": "[\d-]+"|Date: [^\n\\]+|X-Mailer: [^\n\\]+')
    rest = dates.sub("", TEXT)
    assert re.findall(r"\+?\(?\d[\d ().-]{6,}\d", rest) == []
    assert re.findall(r"\d{5,}", rest) == []


def test_no_message_ids_links_or_hosts() -> None:
    assert re.findall(r"(?i)message-id|in-reply-to|received:|https?:|www\.|x-originating", TEXT) == []
    hosts = set(re.findall(r"\b(?:[a-z][\w-]*\.)+(?:com|net|org|edu|ie|uk|de|fr|it|au)\b", TEXT))
    lists = ("linux.ie", "sourceforge.net", "freshrpms.net", "taint.org", "xent.com", "securityfocus.com")
    assert [host for host in hosts if not host.endswith((*lists, "python.org"))] == []


def test_no_common_name_in_any_text() -> None:
    words = set(re.findall(r"[a-z]+", TEXT.lower()))
    assert sorted(words & set(NAMES)) == []


def test_train_and_heldout_share_nothing() -> None:
    def values(part: str, key: str) -> set[str]:
        return {json.dumps(mail["answer"][key]) for mail in PARTS[part]}

    def thread(text: str) -> str:
        return re.sub(r"\[[\w -]+\]|\bre\b|[^a-z]", "", text.lower())

    assert not values("train", "domain") & values("heldout", "domain")
    threads = [{thread(subject) for subject in values(part, "subject")} for part in ("train", "heldout")]
    assert not threads[0] & threads[1]


def test_its_origin_lies_beside_it() -> None:
    origin = (FOLDER / "ORIGIN.md").read_text(encoding="utf-8")
    assert "PDDL" in origin and "CC0" in origin and "make_mails.py" in origin
