"""Objects of HTTP servers and of stores such as S3, read-only, by ranges, through ``fsspec``.

``address`` says what names mean, ``store`` how a range of an object is asked for and whether the object is still the
one that it was, ``http`` and ``objects`` do so for the kinds of stores, ``mirrors`` compares what several servers have
of one object, ``bridge`` leads to the event loop that they live in, ``cache`` keeps what has come in, ``ahead`` knows
what will be wanted next, and ``storage`` ties them together.
"""
