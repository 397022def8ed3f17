"""Exports of NBD servers: the client side of the NBD protocol, fixed newstyle.

``address`` says what names mean, ``protocol`` has the numbers and structures, ``transport`` the bytes of one
connection, ``handshake`` what is agreed on at its start, ``connection`` its requests and replies, ``session`` the
connections to one export, ``journal`` the writes that a server that goes away may forget, ``doubt`` those that may
still come after they were given up, ``link`` ties these together, and ``storage`` makes a storage of it. Section names
in docstrings are those of the protocol's specification, ``doc/proto.md`` in its repository.
"""
