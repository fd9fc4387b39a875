#!/usr/bin/env bash
# Checks every #include against the table of who may include whom. Prints file:line and the reason for
# each one that is not allowed, and exits 1 if there is any.
#
#   scripts/check_arrows.sh [FOLDER]      FOLDER is the source tree; this one by default
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "${1:-$root}"

# room | rooms it may include beside itself | third-party libraries it may include
arrows='
core/base       |                                                                | fmt spdlog nlohmann
core/tensor     | core/base                                                      | fmt
core/config     | core/base                                                      | fmt nlohmann yaml-cpp
core/backend    | core/base core/tensor                                          | fmt dnnl blas openmp simd
core/dist       | core/base core/tensor core/backend                             | fmt
core/layers     | core/base core/tensor core/backend core/dist core/config       | fmt
core/model      | core/base core/tensor core/backend core/dist core/config core/layers | fmt
core/optim      | core/base core/tensor core/backend core/dist core/config core/layers core/model | fmt
core/engine     | core/base core/tensor core/backend core/dist core/config core/layers core/model core/optim | fmt
core/data       | core/base core/tensor core/config                              | fmt nlohmann pcre2 xxhash
core/checkpoint | core/base core/tensor core/backend core/dist core/config core/layers core/model core/optim core/data | fmt nlohmann xxhash
core/metrics    | core/base core/config                                          | fmt nlohmann spdlog simd
cuda            | core                                                           | fmt cuda cudnn cutlass
parallel        | core                                                           | fmt mpi nccl cuda
apps            | core cuda parallel                                             | fmt spdlog nlohmann CLI11
test            | core cuda parallel apps test                                   | fmt spdlog nlohmann catch2 yaml-cpp pcre2 xxhash openmp cuda
'

# library | how its headers are written, as a regular expression
libraries='
fmt      | fmt/.*
spdlog   | spdlog/.*
nlohmann | nlohmann/.*
yaml-cpp | yaml-cpp/.*
CLI11    | CLI/.*
catch2   | catch2/.*
pcre2    | pcre2\.h
xxhash   | xxhash\.h
dnnl     | (oneapi/dnnl/)?dnnl.*\.h(pp)?
blas     | (openblas/)?(cblas|lapacke?)\.h
openmp   | omp\.h
simd     | (imm|x86|arm_neon|cpuid|nmmin|smmin|emmin).*\.h
mpi      | mpi\.h
nccl     | nccl.*\.h
cuda     | (cub/.*|cuda.*|cublas.*|driver_types|nvtx3/.*|cooperative_groups.*|mma)(\.h|\.hpp)?
cudnn    | cudnn.*
cutlass  | (cutlass|cute)/.*
system   | [a-z_0-9]+|(sys|net|netinet|arpa|linux|sanitizer)/[a-z_0-9]+\.h|(c?xxabi|dirent|dlfcn|errno|execinfo|fcntl|ftw|glob|grp|limits|link|malloc|math|netdb|poll|pthread|pwd|sched|semaphore|setjmp|signal|spawn|stdint|stdio|stdlib|string|syslog|termios|time|ucontext|unistd|utime|wait|getopt|libgen|fnmatch|inttypes|float|stdarg|stddef|assert)\.h
'

sources_in apps core parallel cuda test |
  arrows=$arrows libraries=$libraries awk '
    function trim(s) { gsub(/^ +| +$/, "", s); return s }
    function complain(why) { printf "%s:%d: %s\n", file, line, why; faults++ }

    # The room of a path: two levels under core, one elsewhere.
    function room_of(path,   parts, n) {
      n = split(path, parts, "/")
      return parts[1] == "core" && n > 2 ? parts[1] "/" parts[2] : parts[1]
    }
    function may_include(room, other,   top) {
      top = other
      sub(/\/.*/, "", top)
      return room == other || index(rooms[room], " " other " ") || index(rooms[room], " " top " ")
    }
    function library_of(header,   i) {
      for (i = 1; i <= library_count; i++)
        if (header ~ ("^(" pattern[i] ")$")) return library[i]
      return ""
    }
    function exists(path,   ignored, found) {
      if (!(path in known)) {
        found = (getline ignored < path) >= 0
        close(path)
        known[path] = found
      }
      return known[path]
    }

    function check_own(header,   other) {
      if (header == "build_info.h") {  # written by CMake
        if (room != "apps" && room != "test") complain("only apps includes build_info.h")
        return
      }
      if (!exists(header)) {
        complain("\"" header "\" is not a path from the root of the sources")
        return
      }
      other = room_of(header)
      if (!may_include(room, other)) complain(room " must not include " other " (\"" header "\")")
    }
    function check_library(header,   name) {
      name = library_of(header)
      if (name == "") {
        complain("<" header "> is of no known library; scripts/check_arrows.sh lists them")
        return
      }
      if (name == "system") return
      if (!index(allowed[room], " " name " ")) complain(room " must not include " name " (<" header ">)")
      if (name == "nlohmann" && file ~ /\.h$/ && room != "test")
        complain("nlohmann-json belongs in .cpp files: its header costs seconds in each file")
      if (name == "CLI11") {
        if (cli_file != "" && cli_file != file)
          complain("CLI11 takes seconds to compile and is already included by " cli_file)
        cli_file = file
      }
    }

    BEGIN {
      n = split(ENVIRON["arrows"], rows, "\n")
      for (i = 1; i <= n; i++)
        if (split(rows[i], columns, "|") == 3) {
          rooms[trim(columns[1])] = " " trim(columns[2]) " "
          allowed[trim(columns[1])] = " " trim(columns[3]) " "
        }
      n = split(ENVIRON["libraries"], rows, "\n")
      for (i = 1; i <= n; i++)
        if (bar = index(rows[i], "|")) {
          library[++library_count] = trim(substr(rows[i], 1, bar - 1))
          pattern[library_count] = trim(substr(rows[i], bar + 1))
        }
    }
    {
      file = $0
      files++
      room = room_of(file)
      if (!(room in rooms)) {
        line = 1
        complain("the folder " room " is not in the table of scripts/check_arrows.sh")
        next
      }
      for (line = 1; (getline text < file) > 0; line++) {
        if (text !~ /^[ \t]*#[ \t]*(include|import)/) continue
        includes++
        sub(/^[ \t]*#[ \t]*(include_next|include|import)[ \t]*/, "", text)
        if (match(text, /^"[^"]+"/)) check_own(substr(text, 2, RLENGTH - 2))
        else if (match(text, /^<[^>]+>/)) check_library(substr(text, 2, RLENGTH - 2))
        else complain("cannot read this #include; write the path out")
      }
      close(file)
    }
    END {
      if (!files) { print "no sources found"; exit 1 }
      if (faults) { printf "arrows: %d of %d includes are not allowed\n", faults, includes; exit 1 }
      printf "arrows: %d includes in %d files follow the table\n", includes, files
    }'
