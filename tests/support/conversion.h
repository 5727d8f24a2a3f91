// A conversion from options to written folder, in one object.
#pragma once

#include <memory>

#include "convert/calibrate/calibrate.h"
#include "convert/run/convert.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent::testing_support {

// Of folder/source to folder/output by closed forms, with a calibration of its own: trials of sizes are
// quick.
inline ConvertOptions calibrated_closed_forms(const TempFolder& folder) {
  ConvertOptions out;
  out.source = folder / "source";
  out.output = folder / "output";
  out.method = Method::relatent;
  out.calibration = folder / "moments.h5";
  out.relatent.fit.queries = false;
  out.relatent.fit.keys = false;
  out.relatent.fit.refit = false;
  calibrate(Model::open(out.source), random_sequences(1, 12, 40, 50), *out.calibration, [](Index, Index) {});
  return out;
}

class Conversion {
 public:
  // Plans. claim: the output's work folder is made before that rather than by run().
  explicit Conversion(const ConvertOptions& options, const SizeSearch::Watch& watch = {}, bool claim = false)
      : inputs_(open_inputs(options)), given_(options) {
    if (claim) {
      work_ = claim_output(given_, inputs_);
    }
    plan_ = plan_conversion(given_, inputs_, work_.get(), watch);
  }

  const ConvertPlan& plan() const { return plan_; }
  const ConvertOptions& options() const { return plan_.options; }
  const Model& source() const { return inputs_.source; }

  // Once.
  ConvertReport run(const LayerProgress& progress) {
    if (!work_) {
      work_ = claim_output(given_, inputs_);
    }
    ConvertReport report = convert(plan_, inputs_, *work_, progress);
    work_.reset();
    return report;
  }

 private:
  ConvertInputs inputs_;
  ConvertOptions given_;
  std::unique_ptr<WorkFolder> work_;
  ConvertPlan plan_;
};

}  // namespace relatent::testing_support
