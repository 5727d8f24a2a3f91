#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.h"
#include "convert/model/families/family.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

Json to_json() {
  Json out = Json::array();
  for (const Family* family : families()) {
    out.push_back({{"family", family->name},
                   {"model_type", family->model_type},
                   {"use", family->use == FamilyUse::source ? "source" : "result"},
                   {"models", family->models},
                   {"features", family->features}});
  }
  return out;
}

void print_those(FamilyUse use, const char* heading) {
  std::puts(heading);
  for (const Family* family : families()) {
    if (family->use == use) {
      std::printf("  %-14s %s%s%s\n", std::string(family->name).c_str(), std::string(family->models).c_str(),
                  family->features.empty() ? "" : ": ", std::string(family->features).c_str());
    }
  }
}

int run(bool json) {
  if (json) {
    std::puts(to_json().dump().c_str());
    return 0;
  }
  print_those(FamilyUse::source, "converts");
  print_those(FamilyUse::result, "reads what conversions write");
  return 0;
}

}  // namespace

void add_families(CLI::App& app, Command& chosen) {
  auto json = std::make_shared<bool>(false);
  CLI::App* command = app.add_subcommand("families", "Which checkpoints relatent reads");
  command->add_flag("--json", *json, "A JSON list on stdout");
  command->callback([json, &chosen] { chosen = [json] { return run(*json); }; });
}

}  // namespace relatent
