"""What marks a database as ours, and which schema it has.

Apart from `migrations`, which loads sqlite-utils: reading a database must not.
"""

SCHEMA_VERSION = 2  # raised with each migration
APPLICATION_ID = 0x464C5455  # "FLTU": tells our databases from other programs'
