"""Filters of entities: expressions such as "type = 'human' and born < 1900", which are parsed, never executed.

The grammar, with the words in upper or lower case:

```text
filter     = and-part {"or" and-part}
and-part   = part {"and" part}
part       = "not" part | "(" filter ")" | comparison
comparison = COLUMN ("=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=") VALUE
           | COLUMN ["not"] "in" "(" VALUE {"," VALUE} ")"
           | COLUMN "is" ["not"] "null"
VALUE      = NUMBER | "'" TEXT "'" | "true" | "false"
```

A quote inside a text is doubled, and a column whose name is no plain word stands in double quotes. As in SQL, a comparison
with an empty value is neither true nor false. A column of lists, such as `types`, equals a value if one of its items does;
its singular is the same column. Arrow's compute functions evaluate the comparisons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rapidfuzz import process

from hf_mel.errors import FilterError

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))|(?P<text>'(?:[^']|'')*')"""
    r"""|(?P<quoted>"(?:[^"]|"")+")|(?P<word>[^\W\d]\w*)|(?P<sign><=|>=|<>|!=|==|[=<>(),]))"""
)
_COMPARISONS: dict[str, Callable[..., Any]] = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_KEYWORDS = {"and", "or", "not", "in", "is", "null", "true", "false"}
#: Limits of a filter, which may come from a form on the web.
_MAX_LENGTH, _MAX_DEPTH, _MAX_DIGITS = 10_000, 50, 400
_EXAMPLE = "Write a filter such as: type = 'human' and born < 1900"

#: Reads a column of all rows.
ReadColumn = Callable[[str], "pa.Array | pa.ChunkedArray"]


@dataclass
class _Token:
    kind: str
    value: Any
    place: int


class Filter:
    """A parsed filter.

    Args:
        text (`str`): The expression.
        columns (`Mapping[str, pyarrow.DataType]`): The columns of the entities.

    Raises:
        [`~hf_mel.errors.FilterError`]: The expression does not follow the grammar, names a column that is not there, or
            compares a column with a value of another type.
    """

    def __init__(self, text: str, columns: Mapping[str, pa.DataType]):
        self.text, self._columns = text, columns
        if len(text) > _MAX_LENGTH:
            raise FilterError(
                f"The filter has {len(text):,} characters, more than {_MAX_LENGTH:,}.", remedy="Shorten it."
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise FilterError(
                "The filter has half of a surrogate pair.", remedy="Write the whole character, or remove it."
            )
        self._tokens, self._next, self._depth = self._tokenise(), 0, 0
        self._evaluate = self._either()
        if self._peek() is not None:
            raise self._error("The filter should end here, or go on with and, or")

    def mask(self, read: ReadColumn) -> pa.Array:
        """Returns a mask of the rows that pass, without nulls.

        Args:
            read (`Callable`): Returns all values of a column as an Arrow array.
        """
        mask = self._evaluate(read)
        mask = mask.combine_chunks() if isinstance(mask, pa.ChunkedArray) else mask
        return pc.fill_null(mask, False)

    def _tokenise(self) -> list[_Token]:
        tokens, place = [], 0
        while self.text[place:].strip():
            match = _TOKEN.match(self.text, place)
            if match is None:
                place += len(self.text[place:]) - len(self.text[place:].lstrip())
                raise FilterError(
                    f"The filter cannot be read from {self.text[place : place + 20]!r} on.", remedy=f"{_EXAMPLE}."
                )
            kind = str(match.lastgroup)
            value: Any = match[kind]
            if kind == "number":
                if len(value) > _MAX_DIGITS:
                    raise FilterError(
                        f"The number {value[:20]}… has {len(value):,} digits.", remedy="Write it with fewer digits."
                    )
                value = float(value) if re.search(r"[.eE]", value) else int(value)
            elif kind in ("text", "quoted"):
                value = value[1:-1].replace(value[0] * 2, value[0])
            elif kind == "word" and value.lower() in _KEYWORDS:
                kind, value = "keyword", value.lower()
            tokens.append(_Token(kind, value, match.start(str(match.lastgroup))))
            place = match.end()
        return tokens

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take(self, *values: str) -> bool:
        """Takes the next token if it is one of these keywords or signs."""
        token = self._peek()
        if token is None or token.kind not in ("keyword", "sign") or token.value not in values:
            return False
        self._next += 1
        return True

    def _error(self, message: str) -> FilterError:
        token = self._peek()
        where = "at its end" if token is None else f"at {self.text[token.place : token.place + 20]!r}"
        return FilterError(f"{message}, {where}.", remedy=f"{_EXAMPLE}.")

    def _either(self) -> Callable[[ReadColumn], Any]:
        return self._joined("or", self._all, pc.or_kleene)

    def _all(self) -> Callable[[ReadColumn], Any]:
        return self._joined("and", self._part, pc.and_kleene)

    def _joined(
        self, word: str, parse: Callable[[], Callable[[ReadColumn], Any]], join: Callable[[Any, Any], Any]
    ) -> Callable[[ReadColumn], Any]:
        parts = [parse()]
        while self._take(word):
            parts.append(parse())

        def evaluate(read: ReadColumn) -> Any:
            result = parts[0](read)
            for part in parts[1:]:
                result = join(result, part(read))
            return result

        return evaluate

    def _part(self) -> Callable[[ReadColumn], Any]:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise FilterError(f"The filter is nested deeper than {_MAX_DEPTH} levels.", remedy="Simplify it.")
        if self._take("not"):
            part = self._part()
            result: Callable[[ReadColumn], Any] = lambda read: pc.invert(part(read))  # noqa: E731
        elif self._take("("):
            result = self._either()
            if not self._take(")"):
                raise self._error("A closing bracket is missing")
        else:
            result = self._comparison()
        self._depth -= 1
        return result

    def _comparison(self) -> Callable[[ReadColumn], Any]:
        token = self._peek()
        if token is None or token.kind not in ("word", "quoted"):
            raise self._error("The name of a column should follow")
        self._next += 1
        name = self._column(token.value)
        if self._take("is"):
            negated = self._take("not")
            if not self._take("null"):
                raise self._error("null should follow")
            return lambda read: (pc.is_valid if negated else pc.is_null)(_without_empty(read(name)))
        negated = self._take("not")
        if self._take("in"):
            if not self._take("("):
                raise self._error("A list in brackets should follow")
            values = [self._value(name)]
            while self._take(","):
                values.append(self._value(name))
            if not self._take(")"):
                raise self._error("A closing bracket is missing")
            equal = [_compared(name, pc.equal, value) for value in values]

            def contained(read: ReadColumn) -> Any:
                result = equal[0](read)
                for part in equal[1:]:
                    result = pc.or_kleene(result, part(read))
                return pc.invert(result) if negated else result

            return contained
        sign = self._peek()
        if negated or sign is None or sign.value not in _COMPARISONS:
            raise self._error(f"A comparison should follow the column {name!r}")
        self._next += 1
        value = self._value(name)
        if sign.value in ("!=", "<>"):  # of a list: no item is equal
            return lambda read: pc.invert(_compared(name, pc.equal, value)(read))
        return _compared(name, _COMPARISONS[sign.value], value)

    def _column(self, name: str) -> str:
        for known in (name, f"{name}s", name.lower(), f"{name.lower()}s"):
            if known in self._columns and (known.lower() == name.lower() or pa.types.is_list(self._columns[known])):
                return known
        nearest = [match for match, _, _ in process.extract(name, list(self._columns), limit=3, score_cutoff=50)]
        others = nearest or list(self._columns)
        raise FilterError(
            f"The entities have no column {name!r} to filter by.",
            remedy=f"{'The nearest are' if nearest else 'They have'} {', '.join(others[:20])}.",
        )

    def _value(self, name: str) -> pa.Scalar:
        """Takes a value, and returns it in the type of a column."""
        token = self._peek()
        is_value = token is not None and (token.kind in ("number", "text") or token.value in ("true", "false"))
        if token is None or not is_value:
            raise self._error("A number, or a text in single quotes, should follow")
        self._next += 1
        value = token.value == "true" if token.kind == "keyword" else token.value
        column_type = self._columns[name]
        item_type = column_type.value_type if pa.types.is_list(column_type) else column_type
        is_number = pa.types.is_integer(item_type) or pa.types.is_floating(item_type)
        fitting: Any = (int, float) if is_number else bool if pa.types.is_boolean(item_type) else str
        try:
            if not isinstance(value, fitting) or (is_number and isinstance(value, bool)):
                raise pa.ArrowInvalid("other types")
            if is_number:  # 1900.5 is compared with whole years, too
                return pa.scalar(value, pa.float64() if isinstance(value, float) else None)
            return pa.scalar(value).cast(item_type) if pa.types.is_temporal(item_type) else pa.scalar(value, item_type)
        except (pa.ArrowException, OverflowError) as error:
            raise FilterError(
                f"The column {name!r} ({item_type}) cannot be compared with {value!r}.",
                remedy="Write texts and dates in single quotes, and numbers without."
                + (" A date is '1999-12-31'." if pa.types.is_temporal(item_type) else ""),
            ) from error


def _compared(name: str, compare: Callable[..., Any], value: pa.Scalar) -> Callable[[ReadColumn], Any]:
    """Returns a function that compares a column with a value. A list passes if one of its items does."""

    def evaluate(read: ReadColumn) -> Any:
        column = read(name)
        if not pa.types.is_list(column.type):
            return compare(column, value)
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        passing = pc.list_parent_indices(column).filter(pc.fill_null(compare(pc.list_flatten(column), value), False))
        found = pc.is_in(pa.array(range(len(column)), pa.int64()), value_set=pc.unique(passing).cast(pa.int64()))
        return pc.if_else(pc.is_null(column), pa.scalar(None, pa.bool_()), found)

    return evaluate


def _without_empty(column: Any) -> Any:
    """Returns a column with null in place of empty texts and lists, which rows of entities have for null."""
    if pa.types.is_list(column.type):
        return pc.if_else(pc.equal(pc.list_value_length(column), 0), None, pc.list_value_length(column))
    if pa.types.is_string(column.type):
        return pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
    return column
