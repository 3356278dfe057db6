// Greedy generation with this artifact's model.mlpackage, on token ids. Needs macOS 15 or iOS 18.
// NOT COMPILED OR RUN BY US: we had no Apple hardware. Start from it, and check it with verify_on_mac.py.
//
//     swiftc -O -parse-as-library Generate.swift -o generate
//     ./generate FOLDER STEPS ID [ID ...]
import CoreML
import Foundation

struct Settings: Decodable {  // mac.json
    let max_context: Int, chunk: Int, compute: String, state_io: Bool, last_logits: Bool
}

final class Generator {
    private let settings: Settings, prefill: MLModel, decode: MLModel
    private let state: MLState  // of both functions; empty where states are inputs and outputs
    private var past: [String: MLFeatureValue] = [:]
    private(set) var position = 0  // tokens so far

    init(folder: URL) async throws {
        let json = try Data(contentsOf: folder.appendingPathComponent("mac.json"))
        let settings = try JSONDecoder().decode(Settings.self, from: json)
        let units: [String: MLComputeUnits] = [
            "CPU_ONLY": .cpuOnly, "CPU_AND_GPU": .cpuAndGPU, "CPU_AND_NE": .cpuAndNeuralEngine, "ALL": .all,
        ]
        let compiled = try await MLModel.compileModel(at: folder.appendingPathComponent("model.mlpackage"))
        func load(_ function: String) async throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units[settings.compute] ?? .cpuAndGPU
            configuration.functionName = function
            return try await MLModel.load(contentsOf: compiled, configuration: configuration)
        }
        self.settings = settings
        prefill = try await load("prefill")
        decode = try await load("decode")
        state = prefill.makeState()
        for (name, input) in decode.modelDescription.inputDescriptionsByName where name.hasPrefix("past_key_values_") {
            let constraint = input.multiArrayConstraint!
            let zeros = try MLMultiArray(shape: constraint.shape, dataType: constraint.dataType)
            zeros.withUnsafeMutableBytes { bytes, _ in _ = bytes.initializeMemory(as: UInt8.self, repeating: 0) }
            past[name] = MLFeatureValue(multiArray: zeros)
        }
    }

    /// Takes `ids` in and returns the token that follows: whole chunks while they have room, then one by one.
    func append(_ ids: [Int32]) throws -> Int32 {
        precondition(!ids.isEmpty && position + ids.count <= settings.max_context, "no room in the context")
        var next: Int32 = 0, rest = ids[...]
        while !rest.isEmpty {
            let chunked = ids.count > 1 && position + settings.chunk <= settings.max_context
            let taken = Array(rest.prefix(chunked ? settings.chunk : 1))
            rest = rest.dropFirst(taken.count)
            next = try call(chunked ? prefill : decode, taken, width: chunked ? settings.chunk : 1)
        }
        return next
    }

    private func call(_ model: MLModel, _ ids: [Int32], width: Int) throws -> Int32 {
        let padded = ids + Array(repeating: 0, count: width - ids.count)  // pads come after the tokens
        var feeds = past
        feeds["input_ids"] = value(padded, [1, width])
        feeds["position"] = value([Int32(position)], [1])
        if model === prefill { feeds["n_valid"] = value([Int32(ids.count)], [1]) }
        let found = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: feeds), using: state)
        for name in past.keys {
            past[name] = found.featureValue(for: name.replacingOccurrences(of: "past_key_values_", with: "present_"))!
        }
        position += ids.count
        let logits = MLShapedArray<Float>(converting: found.featureValue(for: "logits")!.multiArrayValue!)
        let row = logits[0][min(ids.count, logits.shape[1]) - 1].scalars
        return Int32(row.indices.max { row[$0] < row[$1] }!)
    }

    private func value(_ scalars: [Int32], _ shape: [Int]) -> MLFeatureValue {
        MLFeatureValue(multiArray: MLMultiArray(MLShapedArray(scalars: scalars, shape: shape)))
    }
}

@main struct Generate {
    static func main() async throws {
        let words = CommandLine.arguments
        guard words.count > 3, let steps = Int(words[2]) else { fatalError("usage: generate FOLDER STEPS ID [ID ...]") }
        let generator = try await Generator(folder: URL(fileURLWithPath: words[1]))
        var token = try generator.append(words[3...].compactMap { Int32($0) })
        for _ in 0..<steps {
            print(token)
            token = try generator.append([token])
        }
    }
}
