"""The marks of our databases, and the version of their schema.

Separate from `migrations`, which loads sqlite-utils: reading a database must not load it.
"""

SCHEMA_VERSION = 2  # raised with each migration
APPLICATION_ID = 0x464C5455  # "FLTU": tells our databases from other programs'
