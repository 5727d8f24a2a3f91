#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/progress.h"
#include "linalg/stages.h"

namespace relatent {

void add_cost(nlohmann::ordered_json& out) {
  out["peak_rss_bytes"] = peak_rss_bytes();
  out["stages"] = nlohmann::ordered_json::array();
  for (const StageTime& stage : stage_times()) {
    out["stages"].push_back(
        {{"stage", stage.name}, {"thread_seconds", stage.thread_seconds}, {"times", stage.times}});
  }
}

}  // namespace relatent
