#!/usr/bin/env bash
# Makes a training text from a Debian package. One target so far:
#
#   scripts/corpus.sh kjv [FOLDER]      the King James Bible, 4.1 MB, into data/kjv/text
#
# Writes train.jsonl and valid.jsonl, one chapter a line as {"text": ...} with one verse a line, and
# valid.txt, the plain text of the validation chapters. Whole books are held out for validation, one
# of each kind: Esther (narrative), Ecclesiastes (wisdom), John (gospel), Romans (epistle). John is
# the gospel that shares the fewest sentences with the other three. Running it again changes nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

held_out='Est Eccl John Rom'

# check_size FILE LINES BYTES: too few or too many lines are an error, other bytes a remark, because
# another release of the package may have corrected a verse.
check_size() {
  local lines bytes
  lines=$(wc -l <"$1") bytes=$(wc -c <"$1")
  if ((lines != $2)); then
    die "$(basename "$1") has $lines lines where $2 were expected: the program 'bible' prints another
text than the one this script knows how to split"
  fi
  if ((bytes != $3)); then
    say "note: $(basename "$1") has $bytes bytes where $3 were expected; this text differs from the one
of Debian 12, so compare its figures only with each other"
  fi
}

# Reads "Ge1:1 In the beginning ..." lines; writes the three files into the folder.
split_chapters() {
  awk -v held_out=" $held_out " -v folder="$1" '
    function finish_chapter() {
      if (text == "") return
      if (index(held_out, " " book " ")) {
        printf "%s\n", plain > (folder "/valid.txt")
        file = folder "/valid.jsonl"
      } else {
        file = folder "/train.jsonl"
      }
      printf "{\"text\": \"%s\"}\n", text > file
      text = plain = ""
    }
    {
      if (!match($0, /^[1-3]?[A-Za-z]+[0-9]+:[0-9]+ /)) {
        printf "line %d does not begin with a verse label: %s\n", NR, $0 > "/dev/stderr"
        exit 1
      }
      label = substr($0, 1, RLENGTH - 1)
      verse = substr($0, RLENGTH + 1)
      sub(/ +$/, "", verse)
      sub(/:.*/, "", label)
      if (verse ~ /["\\]/ || verse ~ /[^ -~]/) {
        printf "line %d holds a character that JSON would need escaped: %s\n", NR, $0 > "/dev/stderr"
        exit 1
      }
      if (label != chapter) finish_chapter()
      chapter = book = label
      sub(/[0-9]+$/, "", book)
      plain = plain (plain == "" ? "" : "\n") verse
      text = text (text == "" ? "" : "\\n") verse
    }
    END { finish_chapter() }'
}

make_kjv() {
  local folder=$1
  if ! command -v bible >/dev/null; then
    die "the program 'bible' is missing; scripts/install_deps.sh corpus installs it"
  fi
  mkdir -p "$folder"
  work=$(mktemp -d "$folder/tmp-XXXXXX")
  trap 'rm -rf "$work"' EXIT
  bible -f ge1:1-rev22:21 </dev/null >"$work/verses" || die "'bible -f ge1:1-rev22:21' failed"
  check_size "$work/verses" 31102 4404412
  split_chapters "$work" <"$work/verses" || die "the output of 'bible' could not be split into chapters"
  rm "$work/verses"
  check_size "$work/train.jsonl" 1130 3972825
  check_size "$work/valid.jsonl" 59 209205
  check_size "$work/valid.txt" 1701 206855
  cat >"$work/README" <<'END'
The King James Bible (1611), as the Debian package bible-kjv prints it, without verse labels.
The copyright of the text has expired; in the United Kingdom its printing is under a patent of the
Crown. The package's tools are under the GNU General Public License, version 2 or later; none of
them is in these files. See /usr/share/doc/bible-kjv/copyright.
END
  mv -f "$work/train.jsonl" "$work/valid.jsonl" "$work/valid.txt" "$folder"
  mv -f "$work/README" "$folder"  # last: it says that the folder is complete
}

if [[ ${1:-} != kjv ]] || (($# > 2)); then die "usage: scripts/corpus.sh kjv [FOLDER]"; fi
folder=${2:-data/kjv/text}
if [[ -f $folder/README ]]; then
  say "corpus: $folder is there"
else
  make_kjv "$folder"
  say "corpus: wrote $folder"
fi
printf 'corpus: %d training chapters (%d bytes of JSON), %d validation chapters (%d bytes of text)\n' \
  "$(wc -l <"$folder/train.jsonl")" "$(wc -c <"$folder/train.jsonl")" \
  "$(wc -l <"$folder/valid.jsonl")" "$(wc -c <"$folder/valid.txt")"
say "corpus: King James Bible, copyright expired (Crown patent in the United Kingdom)"
