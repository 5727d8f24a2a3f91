#include "formats/process.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <string>
#include <system_error>

#include "formats/error.h"
#include "formats/mapped_file.h"

namespace relatent {

void prepare_process() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (::fcntl(stream, F_GETFD) == -1 && errno == EBADF) {
      // The lowest free number, which is this one. For the other direction, so that using it still fails.
      static_cast<void>(::open("/dev/null", stream == STDIN_FILENO ? O_WRONLY : O_RDONLY));
    }
  }
  static_cast<void>(std::signal(SIGXFSZ, SIG_IGN));
  report_cut_files();
}

void finish_stdout() {
  const bool failed_before = std::ferror(stdout) != 0;
  errno = 0;
  std::cout.flush();
  if (std::fflush(stdout) == 0 && !failed_before && std::cout.good()) {
    return;
  }
  // Of an earlier failure the reason is gone.
  const std::string reason = errno != 0 ? ": " + std::generic_category().message(errno) : "";
  throw Error(ErrorKind::machine, "cannot write to the standard output" + reason);
}

}  // namespace relatent
