"""UniProt's accessions: the `P69905` of the id `sp|P69905|HBA_HUMAN`."""

import re

# UniProt's ids are database|accession|name. The same expression for Python and for DuckDB.
ACCESSION = r"^(?:sp|tr)\|([^|]+)\|"
# What an accession looks like, an isoform's too. Source: https://www.uniprot.org/help/accession_numbers
_NUMBER = re.compile(r"([OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9]([A-Z][A-Z0-9]{2}[0-9]){1,2})(-[0-9]+)?")


def accession(record_id: str) -> str | None:
    """The accession in an id of UniProt's form; None in any other.

    >>> accession("sp|P69905|HBA_HUMAN"), accession("P69905")
    ('P69905', None)
    """
    found = re.match(ACCESSION, record_id)
    return found[1] if found else None


def is_accession(text: str) -> bool:
    """Whether a text has the form of an accession.

    >>> is_accession("P69905"), is_accession("A0A024R1R8-2"), is_accession("p1")
    (True, True, False)
    """
    return _NUMBER.fullmatch(text) is not None
